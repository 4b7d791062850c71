"""What samplers cost besides the network: python -m tests.bench.samplers

A Muse of scale tiny with random weights draws 16 pictures of 8x8 tokens in at most 12 calls by
every sampler for masks, one after the other and round by round in one process on one thread. A
figure is the least of the rounds: processor time per network call over that of the paper's own
loop, and the share of it outside of the network's blocks (its output table counts as outside).
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_modules.common.request import Request
from lightning_modules.muse.module import MuseModule
from tests.bench.machine import heading
from tests.tiny_generators import Greys

ROUNDS, PICTURES, STEPS = 3, 16, 12
MODEL = {
    "num_codes": 512,
    "hidden": 96,
    "mlp": 96,
    "mlp_type": "conv",
    "layers": 4,
    "heads": 4,
    "max_side": 8,
    "text_width": 128,
    "head_mlp": False,
    "dropout": 0.0,
}
NAMES = [
    "own",
    "confidence",
    "margin",
    "random",
    "halton",
    "moment",
    "eb",
    "klass",
    "mdlm",
    "remdm_conf",
    "p2",
    "posterior",
    "flow",
]


def tiny_muse() -> MuseModule:
    """Muse of scale tiny, untrained."""
    torch.manual_seed(0)
    config = {
        "paper": "muse",
        "seed": 0,
        "grid": [8, 8],
        "num_codes": 512,
        "model": MODEL,
        "text": {"name": "bytes", "width": 128},
        "objective": {"visible_weight": 1.0},
        "sampling": {"steps": STEPS, "guidance_start": 2.0, "guidance_end": 2.0},
    }
    return MuseModule(config).attach(Greys()).eval()


class Clock:
    """Adds up the processor time of a function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any) -> Tensor:
        began = time.process_time()
        result = self.function(*arguments)
        self.seconds += time.process_time() - began
        return result


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    print(heading())
    module = tiny_muse()
    clock = Clock(module.network.mixed_rows)
    module.network.mixed_rows = clock  # type: ignore[method-assign]
    request = Request(["a small red circle"] * PICTURES, list(range(PICTURES)))
    best: dict[str, tuple[float, float]] = {}
    for _ in range(ROUNDS):
        for name in NAMES:
            settings = module.settings({"sampler": {"name": name, "limit": STEPS}})
            clock.seconds, began = 0.0, time.process_time()
            module.sample_tokens(request, settings)
            assert module.calls is not None
            calls = float(module.calls.double().mean())
            seconds = (time.process_time() - began) / calls
            best[name] = min(best.get(name, (seconds, 1.0)), (seconds, clock.seconds / calls))
    own = best["own"][0]
    for name, (seconds, network) in best.items():
        print(
            f"{name:12s} {seconds / own:5.2f} of the own loop, {1 - network / seconds:4.0%} besides"
        )


if __name__ == "__main__":
    main()

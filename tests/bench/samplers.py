"""What samplers cost besides the network: python -m tests.bench.samplers [--rounds 3] [PAPER ...]

For each paper at the size of its own bench, one picture, guided: processor time per network call
of the paper's loop and of every sampler that fits its noise, in one process on one thread, least of
the rounds. The network is called a few times by itself, guided and not; the loops get random
features in its place and the real output table, whose time counts as the network's. The table shows
the sampler's share of a guided step, in percent: what neither the network nor its table needs.

Beside it stands how much more a guided call, and a guided step of the paper's loop, costs than an
unguided one. It is less than twice as much where the guided one saves, not where the unguided one
wastes: both sides share the embedding and the blocks up to the first sight of the text, and since
their features are mixed in front of the output table, table and sampler have one side's work in
either. The smaller the network is beside its table, the nearer the steps are to each other.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_modules.common.guidance import Guidance
from lightning_modules.muse import process as muse_process
from lightning_modules.paella import process as paella_process
from lightning_modules.samplers import serve
from lightning_modules.samplers.kernel import Corruption, Uniform
from lightning_modules.samplers.settings import SamplerConfig
from lightning_modules.vq_diffusion import process as vq_process
from tests.bench import muse, paella, vq_diffusion
from tests.bench.machine import heading, one_thread

STEPS = 8
SPREAD = 5.0  # of the logits; the mean entropy is then about 1.5 to 2 nats, as of trained networks
MASKS = ["confidence", "margin", "random", "halton", "moment", "eb", "klass", "mdlm", "remdm_conf"]
MASKS += ["p2", "posterior", "flow"]
RANDOM = ["posterior", "gibbs", "flow", "eb", "renoise_start", "renoise_rand"]


@dataclass
class Case:
    """A paper at its bench's size."""

    grid: tuple[int, int]
    width: int
    """Of the features in front of the output table."""
    kernel: Corruption
    head: Callable[[Tensor], Tensor]
    call: Callable[[float], Tensor]
    """A network call for one half-done picture at a guidance scale; every place is asked about."""
    own: Callable[[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], Tensor]
    """The paper's loop of STEPS steps: (keep -> features, head) -> tokens."""
    temperature: tuple[float, float] = (1.0, 1.0)
    narrow: Callable[[Tensor], Tensor] | None = None


def muse_case() -> Case:
    network, _ = muse.make_networks()
    grid = (muse.SIDE, muse.SIDE)
    codes = network.config.num_codes
    cond, null = (network.prepare(**side) for side in muse.make_inputs())
    settings = muse.settings(STEPS)
    x = torch.full((1, *grid), network.mask_id)
    x[:, ::2] = 1

    def call(scale: float) -> Tensor:
        sides, shares = ([cond], [1.0]) if scale == 1 else ([cond, null], [scale, 1 - scale])
        return network.mixed_rows(x, sides, shares, torch.ones_like(x, dtype=torch.bool))

    def own(rows: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor]) -> Tensor:
        return muse_process.decode(
            lambda x, scale, keep: rows(keep),
            head,
            start=torch.full((1, *grid), network.mask_id),
            mask_id=network.mask_id,
            **muse_process.sample_noise([7], STEPS, grid),
            **muse_process.loop_settings(settings, torch.tensor([muse.SIDE**2])),
        )

    kernel = muse_process.noise_of(settings, codes)
    return Case(grid, call(1.0).shape[1], kernel, network.head, call, own)


def vq_diffusion_case() -> Case:
    network, _ = vq_diffusion.make_networks()
    grid, codes = vq_diffusion.GRID, vq_diffusion.CONFIG.num_codes
    cond, null = (network.prepare(text) for text in vq_diffusion.make_texts())
    x = torch.full((1, *grid), codes)
    x[:, ::2] = 1

    def call(scale: float) -> Tensor:
        sides, shares = ([cond], [1.0]) if scale == 1 else ([cond, null], [scale, 1 - scale])
        return network.mixed_rows(x, torch.tensor([50]), sides, shares)

    def own(rows: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor]) -> Tensor:
        noise = vq_process.sample_noise([7], STEPS, grid)
        noise.pop("start")
        return vq_process.sample(
            lambda x, t, keep: rows(keep),
            head,
            x=torch.full((1, *grid), codes),
            steps=vq_process.exact_steps(vq_diffusion.SCHEDULE, STEPS),
            truncation=vq_diffusion.TRUNCATION,
            **noise,
        )

    kernel = vq_diffusion.SCHEDULE.corruption()
    narrow = partial(vq_process.truncate, rate=vq_diffusion.TRUNCATION)
    return Case(grid, call(1.0).shape[1], kernel, network.head, call, own, narrow=narrow)


def paella_case() -> Case:
    network, _ = paella.make_networks()
    codes = paella.CONFIG.num_labels
    cond, null = (network.prepare(*network.condition(**side)) for side in paella.make_inputs())
    predict = network.predictor(cond, null)
    config = paella.SamplingConfig(steps=STEPS)
    x = torch.randint(codes, (1, *paella.GRID), generator=torch.Generator().manual_seed(1))

    def call(scale: float) -> Tensor:
        return predict(x, torch.tensor([0.5]), scale, torch.ones_like(x, dtype=torch.bool))

    def own(rows: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor]) -> Tensor:
        noise = paella_process.sample_noise([7], STEPS, STEPS - 1, paella.GRID, codes)
        loop = paella_process.loop_settings(config)
        return paella_process.sample(lambda x, t, w, keep: rows(keep), head, **noise, **loop)

    heat = (config.temperature_start, config.temperature_end)
    width = call(1.0).shape[1]
    return Case(paella.GRID, width, Uniform(codes), network.head, call, own, heat)


CASES = {"muse": muse_case, "vq_diffusion": vq_diffusion_case, "paella": paella_case}


class Clock:
    """Adds up the processor time of a function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any) -> Tensor:
        began = time.process_time()
        result = self.function(*arguments)
        self.seconds += time.process_time() - began
        return result


def loop_of(case: Case, name: str, features: Tensor, head: Clock) -> tuple[Callable[[], Any], Any]:
    """A loop over random features, and what counts its calls."""
    calls = [0]

    def rows(keep: Tensor) -> Tensor:
        calls[0] += 1
        return features[: int(keep.sum())]

    if name == "own":
        return lambda: case.own(rows, head), calls

    def served(pictures: Tensor, x: Tensor, t: Tensor, scale: float, keep: Tensor) -> Tensor:
        return rows(keep)

    guidance = Guidance.constant(3.0)
    network = serve.Network(served, head, case.kernel, guidance, case.temperature, case.narrow)
    config = SamplerConfig(name, limit=STEPS)  # type: ignore[arg-type]
    everywhere = torch.ones(1, *case.grid, dtype=torch.bool)
    settings: Any = {"seeds": [7], "steps": STEPS, "given": None, "generate": everywhere}
    return lambda: serve.sample(config, network, **settings), calls


def timed(function: Callable[..., Any], *arguments: Any) -> float:
    began = time.process_time()
    function(*arguments)
    return time.process_time() - began


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("papers", nargs="*", choices=[[], *CASES])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    one_thread()
    print(heading())
    for paper in args.papers or CASES:
        case = CASES[paper]()
        guided, alone = (
            min(timed(case.call, scale) for _ in range(args.rounds)) for scale in (3.0, 1.0)
        )
        print(f"{paper}: a guided call {guided:.3f} s, {guided / alone:.2f} times an unguided one")
        count = case.grid[0] * case.grid[1]
        features = torch.randn(count, case.width, generator=torch.Generator().manual_seed(0))
        features *= SPREAD / case.head(features[:64]).std()
        names = MASKS if case.kernel.masks else RANDOM
        best: dict[str, tuple[float, float]] = {}
        for _ in range(args.rounds):
            for name in ["own", *names]:
                head = Clock(case.head)
                loop, calls = loop_of(case, name, features, head)
                seconds = timed(loop) - head.seconds
                found = seconds / calls[0], head.seconds / calls[0]
                best[name] = min(best.get(name, found), found)
        beside = sum(best["own"])
        ratio = (guided + beside) / (alone + beside)
        print(f"  a guided step of the own loop: {ratio:.2f} times an unguided one")
        for name, (maths, table) in best.items():
            share = maths / (maths + table + guided)
            print(
                f"  {name:14s} {share:6.1%}  ({maths * 1e3:.1f} ms of maths per call)", flush=True
            )


if __name__ == "__main__":
    main()

"""What a CUDA card makes of the suite, in at most 8 minutes.

    python -m tests.bench.gpu [--device cuda|cpu] [--size bench|micro] [--only PART ...]

loops: every paper's guided loop with random weights: as released, ours step by step, with compiled
steps and with steps captured as CUDA graphs (the compiler's and the capture's own time is left
out). amused: aMUSEd-256 in bf16, 12 steps, batches of 1 and 8. training: steps per second and model
FLOPs utilisation at Paella 1B and Muse 632M in bf16. features: pictures per second through
Inception's form (--inception FILE for the published weights, else a stand-in of little work).

With --device cpu --size micro it shows that everything runs, and no figure means anything.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from eval.extractors import InceptionRows
from lightning_modules.common.config import OptimConfig
from lightning_modules.common.optim import adamw
from lightning_modules.common.places import Masked, Picked
from lightning_modules.muse.config import MODELS as MUSE_MODELS
from lightning_modules.muse.config import ModelConfig as MuseSizes
from lightning_modules.muse.config import UViTConfig
from lightning_modules.muse.network import MaskedTransformer
from lightning_modules.paella.config import ModelConfig as PaellaSizes
from lightning_modules.paella.network import Paella
from tests.bench.cases import CASES, Case, muse_case, random_network
from tests.bench.machine import heading, matmul_peak, measure
from tests.tiny_generators import MUSE, PAELLA, UVIT
from tests.tiny_networks import inception_file

STEPS = {"bench": 12, "micro": 3}
REPEATS = {"bench": 5, "micro": 1}


class Captured:
    """A step that is recorded as a CUDA graph at its first call and replayed afterwards.

    One recording serves all calls of the same kind: the same numbers and shapes among its
    arguments.
    """

    def __init__(self, step: Callable[..., Any]) -> None:
        self.step = step
        self.made: dict[Any, tuple[Any, list[Tensor], Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        leaves, form = tree_flatten(arguments)
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        plain = tuple(leaf for leaf in leaves if isinstance(leaf, bool | float | type(None)))
        kind = (plain, tuple(tensor.shape for tensor in given))
        if kind not in self.made:
            self.made[kind] = self._record(leaves, form)
        graph, inputs, result = self.made[kind]
        for kept, tensor in zip(inputs, given, strict=True):
            kept.copy_(tensor)
        graph.replay()
        found, shape = tree_flatten(result)
        return tree_unflatten([v.clone() if isinstance(v, Tensor) else v for v in found], shape)

    def _record(self, leaves: list[Any], form: Any) -> tuple[Any, list[Tensor], Any]:
        kept = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        arguments = tree_unflatten(kept, form)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.step(*arguments)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self.step(*arguments)
        return graph, [leaf for leaf in kept if isinstance(leaf, Tensor)], result


class Once:
    """Makes a step fast once and keeps it for further loops, whose constants are the same."""

    def __init__(self, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self.make, self.made = make, dict[Any, Callable[..., Any]]()

    def __call__(self, step: Callable[..., Any]) -> Callable[..., Any]:
        return self.made.setdefault(step.__code__, self.make(step))


def ways(device: str, size: str) -> dict[str, Callable[[], Picked]]:
    """The forms of a step that are compared."""
    where = torch.device(device)
    found: dict[str, Callable[[], Picked]] = {
        "picked": Picked,
        "masked": partial(Masked, where),
    }
    backend = "eager" if size == "micro" else "inductor"
    compiler = partial(torch.compile, backend=backend, fullgraph=True)
    found["compiled"] = partial(Masked, where, compiler)
    if device == "cuda":
        found["CUDA graph"] = partial(Masked, where, Once(Captured))
    return found


def bench_loops(device: str, size: str) -> None:
    """Each paper's loop in every form against the released one."""
    steps, repeats = STEPS[size], REPEATS[size]
    for name, make in CASES.items():
        case = make(size, device, 1)
        with torch.device(device):
            plain = warm(lambda case=case: case.plain(steps), repeats, device)  # type: ignore[misc]
        print(f"{name}: as released {1000 * plain:.1f} ms, {steps} steps")
        for form, places in ways(device, size).items():

            def run(case: Case = case, places: Callable[[], Picked] = places) -> Tensor:
                return case.loop(steps, places())

            taken = warm(run, repeats, device)
            print(f"  {form:10s} {1000 * taken:.1f} ms, ratio {plain / taken:.2f}")


def warm(run: Callable[[], object], repeats: int, device: str) -> float:
    """Run twice, then return the median seconds of a run."""
    run()
    run()
    return measure(run, repeats, device)


def bench_amused(device: str, size: str) -> None:
    """aMUSEd-256 with batches of 1 and 8."""
    config = UViTConfig(**UVIT) if size == "micro" else UViTConfig()
    lower = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    for batch in (1, 8):
        case = muse_case(size, device, batch, config)
        with lower:
            for form, places in ways(device, size).items():
                if form == "compiled" and size == "micro":
                    continue  # of which the loops have shown that it runs
                run = partial(_loop, case, STEPS[size], places)
                taken = warm(run, REPEATS[size], device)
                print(f"aMUSEd-256, batch {batch}, {form}: {1000 * taken / batch:.1f} ms a picture")


def _loop(case: Case, steps: int, places: Callable[[], Picked]) -> Tensor:
    return case.loop(steps, places())


def paella_step(size: str, device: str, batch: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The 1B network of Paella and its loss on 64x64 tokens."""
    config = PaellaSizes(**PAELLA) if size == "micro" else PaellaSizes()
    network: Any = random_network(Paella(config)).to(device)
    side = 4 if size == "micro" else 64
    x = torch.randint(config.num_labels, (batch, side, side), device=device)
    t = torch.rand(batch, device=device)
    text = torch.randn(batch, 60, config.byt5_embd, device=device)
    clip = torch.randn(batch, config.clip_embd, device=device) if config.clip_embd else None

    def loss() -> Tensor:
        condition = network.prepare(*network.condition(text, clip))
        logits = network.head(network.mixed_rows(x, t, [condition], [1.0]))
        return nn.functional.cross_entropy(logits.float(), x.flatten())

    return network, loss


def muse_step(size: str, device: str, batch: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The 632M base of Muse and its loss on 16x16 tokens."""
    config = MuseSizes(**MUSE) if size == "micro" else MUSE_MODELS["632m"]
    network: Any = random_network(MaskedTransformer(config)).to(device)
    side = 4 if size == "micro" else 16
    x = torch.randint(config.num_codes, (batch, side, side), device=device)
    text = torch.randn(batch, 64, config.text_width, device=device)

    def loss() -> Tensor:
        rows = network.mixed_rows(x, [network.prepare(text)], [1.0])
        return nn.functional.cross_entropy(network.head(rows).float(), x.flatten())

    return network, loss


def bench_training(device: str, size: str) -> None:
    """Forward, backward and fused AdamW in bf16; the FLOPs are those counted in one step."""
    peak = matmul_peak(device, torch.bfloat16, side=64 if size == "micro" else 0)
    cases = {"Paella 1B": (paella_step, 8), "Muse 632M": (muse_step, 64)}
    for name, (make, batch) in cases.items():
        network, loss = make(size, device, 2 if size == "micro" else batch)
        optimizer = adamw(OptimConfig(), [network.train()])

        def step(
            loss: Callable[[], Tensor] = loss, optimizer: torch.optim.Optimizer = optimizer
        ) -> None:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                value = loss()
            value.backward()
            optimizer.step()

        with FlopCounterMode(display=False) as counter:
            step()
        taken, flops = warm(step, REPEATS[size], device), counter.get_total_flops()
        print(
            f"{name}: {1 / taken:.2f} steps/s of {batch}, {flops / taken / 1e12:.3g} TFLOP/s, "
            f"{flops / taken / peak:.0%} of the measured bf16 matmul"
        )
        del network, optimizer, loss


def bench_features(device: str, size: str, inception: Path | None) -> None:
    """Rows of pool3 features of pictures that are in memory."""
    count = 8 if size == "micro" else 256
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = InceptionRows(inception or inception_file(folder)).load(device, folder=folder)
        pictures = torch.randint(0, 256, (count, 3, 256, 256), dtype=torch.uint8)
        taken = warm(lambda: rows(pictures, [], 0), REPEATS[size], device)
    what = "the published weights" if inception else "a stand-in"
    print(f"features of {what}: {count / taken:.0f} pictures/s of 256 px, decoded before")


PARTS: dict[str, Callable[[str, str], None]] = {
    "loops": bench_loops,
    "amused": bench_amused,
    "training": bench_training,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("bench", "micro"), default="bench")
    parser.add_argument("--only", nargs="+", choices=(*PARTS, "features"))
    parser.add_argument("--inception", type=Path)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA card here; --device cpu --size micro shows that it runs")
    torch.manual_seed(0)
    print(heading(args.device, torch.bfloat16 if args.device == "cuda" else torch.float32))
    asked = args.only or [*PARTS, "features"]
    for name, run in PARTS.items():
        if name in asked:
            with torch.enable_grad() if name == "training" else torch.no_grad():
                run(args.device, args.size)
    if "features" in asked:
        with torch.no_grad():
            bench_features(args.device, args.size, args.inception)


if __name__ == "__main__":
    main()

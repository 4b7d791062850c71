"""How near every paper's guided network call and training step come to the machine's matmul.

    python -m tests.bench.roofline [--size bench|micro] [--part sampling|training] [--compile]
                                   [--repeats 5]

The networks are those of the other benches, with random weights, on one thread. FLOPs are counted
by torch.utils.flop_counter (matmuls, convolutions, attention). Bytes are those that the operations
read and write, each by itself: what the memory would carry if no cache held anything. The share is
that of the matmul rate measured here just before. With --compile each step is also timed as
torch.compile makes it, in turn with the plain one.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lightning_modules.common.processor import keep_memory
from tests.bench.cases import CASES, Case
from tests.bench.machine import matmul_peak, measure, one_thread, processor

Shape = Sequence[int]


class Bytes(TorchDispatchMode):
    """Adds up the bytes that operations read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in [*tensors(args), *tensors(out)]:
                self.total += tensor.numel() * tensor.element_size()
        return out


def attention_flops(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Count torch's blockwise kernel on a CPU, which its counter does not know."""
    return sdpa_flop_count(q, k, v)


def attention_backward_flops(_: Shape, q: Shape, k: Shape, v: Shape, *__: Any, **___: Any) -> int:
    """Count its way back: the weights again, and two gradients of either product."""
    return 5 * sdpa_flop_count(q, k, v) // 2


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def tensors(value: Any) -> list[Tensor]:
    """List the tensors in nested lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, list | tuple) else []


def training(case: Case) -> Callable[[], Any]:
    """A step forwards and backwards at the same sizes."""

    def step() -> None:
        case.network.zero_grad()
        with torch.enable_grad():
            case.call().float().square().mean().backward()

    return step


def prepared_without_graph(case: Case) -> Callable[[], Any]:
    """A call without gradients."""

    def call() -> Tensor:
        with torch.no_grad():
            return case.call()

    return call


def in_turn(runs: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median seconds of each, measured in turn after two calls."""
    for run in [*runs, *runs]:
        run()
    taken = [[measure(run, 1) for run in runs] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def rows(size: str, parts: Sequence[str], repeats: int, peak: float, compiled: bool) -> list[str]:
    """Measure every paper; rows of a table."""
    found = []
    for name, make in CASES.items():
        for part in parts:
            with torch.no_grad():  # conditions are prepared once
                case = make(size, "cpu", 1)
            kind = training if part == "training" else prepared_without_graph
            run, runs = kind(case), [kind(case)]
            if compiled:
                runs.append(kind(case._replace(call=torch.compile(case.call))))
            with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
                run()
            with Bytes() as moved:
                run()
            torch.compiler.reset()
            taken, *others = in_turn(runs, repeats)
            flops = counter.get_total_flops()
            more = "".join(
                f" {1000 * t:.3g} | {flops / t / peak:.0%} | {taken / t:.2f} |" for t in others
            )
            found.append(
                f"| {name} | {part} | {flops / 1e9:.3g} | {moved.total / 1e9:.3g} | "
                f"{1000 * taken:.3g} | {flops / taken / 1e9:.3g} | {flops / taken / peak:.0%} |"
                + more
            )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("bench", "micro"), default="bench")
    parser.add_argument("--part", choices=("sampling", "training"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    one_thread()
    keep_memory()
    torch.manual_seed(0)
    peak = matmul_peak(side=64 if args.size == "micro" else 0)
    print(f"{processor()}, 1 thread: matmul at {peak / 1e9:.0f} GFLOP/s in float32\n")
    more = " compiled, ms | share | ratio |" if args.compile else ""
    print(f"| network | step | GFLOP | GB | ms | GFLOP/s | share of matmul |{more}")
    print("|---|---|---|---|---|---|---|" + "---|" * 3 * args.compile)
    parts = [args.part] if args.part else ["sampling", "training"]
    print("\n".join(rows(args.size, parts, args.repeats, peak, args.compile)))


if __name__ == "__main__":
    main()

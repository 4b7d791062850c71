"""What a bench ran on: processor, measured matmul peak, and the network's share of the time."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from lightning_modules.common.processor import multiply_by_onednn

Result = TypeVar("Result")
SIDES = {"cpu": 1024, "cuda": 8192}  # of the matrices whose product is timed


def processor(device: str = "cpu") -> str:
    """Name the processor, or the card."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def one_thread() -> None:
    """Compute on one thread, as the commands do on a CPU, but for the memory that they keep.

    What keeps it serves the whole process, the other side of a comparison as well.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    multiply_by_onednn()


def as_shipped(run: Callable[[], Result]) -> Callable[[], Result]:
    """Let the other side of a comparison multiply as torch does where nobody asks for more."""

    def alone() -> Result:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            return run()
        finally:
            torch.set_float32_matmul_precision(precision)

    return alone


def wait(device: str) -> None:
    """Wait for all work of a device."""
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_peak(
    device: str = "cpu", dtype: torch.dtype = torch.float32, repeats: int = 7, side: int = 0
) -> float:
    """Measure the floating-point operations per second of the best of some square products."""
    side = side or SIDES[device]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    best = min(measure(lambda: torch.mm(a, b), 1, device) for _ in range(repeats))
    return 2 * side**3 / best


def measure(run: Callable[[], object], repeats: int, device: str = "cpu") -> float:
    """Return the median of the seconds that a function takes; on one thread, of its core."""
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock, taken = time.thread_time if alone else time.perf_counter, []
    for _ in range(repeats):
        wait(device)
        begin = clock()
        run()
        wait(device)
        taken.append(clock() - begin)
    return statistics.median(taken)


def heading(device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Say what a bench runs on; a ratio of two machines differs, and this is why."""
    name, peak = str(dtype).removeprefix("torch."), matmul_peak(device, dtype)
    threads = f", {torch.get_num_threads()} thread(s)" if device == "cpu" else ""
    return f"{processor(device)}{threads}: matmul at {peak / 1e9:.0f} GFLOP/s in {name}"


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Wall time and time of this thread on a core; they differ where the machine is busy."""
    wall, core = time.perf_counter(), time.thread_time()
    run()
    return time.perf_counter() - wall, time.thread_time() - core


class Clock:
    """A function that adds up the core time spent in it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        begin = time.thread_time()
        result = self.function(*arguments, **named)
        self.seconds += time.thread_time() - begin
        return result


def network_share(run: Callable[[], object], owner: Any, *methods: str) -> float:
    """Return the share of a run's core time that some methods of a network take."""
    clocks = {name: Clock(getattr(owner, name)) for name in methods}
    for name, clock in clocks.items():
        setattr(owner, name, clock)
    try:
        _, core = seconds(run)
    finally:
        for name in methods:
            delattr(owner, name)
    return sum(clock.seconds for clock in clocks.values()) / core

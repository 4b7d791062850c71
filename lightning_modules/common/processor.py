"""How a process uses its CPU: the library that multiplies, and memory that is kept."""

import ctypes
import sys

import torch

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # parameters of glibc's mallopt
ROUNDING = 1e-5  # float32 is 100 times more exact, bfloat16 100 times less


def prepare_cpu() -> None:
    """Make torch swift on a machine without a GPU; numbers stay float32."""
    # a GELU's far tail is full of numbers below 1e-38, with which a CPU is six times slower; this
    # has to come before torch makes its threads, which take it over
    torch.set_flush_denormal(True)
    if torch.cuda.is_available():
        return
    keep_memory()
    multiply_by_onednn()  # makes torch's threads, so what is forked later should compute on one


def keep_memory() -> None:
    """Keep freed memory for the next tensor.

    glibc returns it to the system, which then hands out every page anew, filled with zeros. At
    32 px that is a fifth of the time of a VQGAN.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
        if mallopt is not None:
            mallopt(TRIM_THRESHOLD, -1)
            mallopt(MMAP_MAX, 0)


def multiply_by_onednn() -> bool:
    """Let oneDNN multiply float32 matrices in place of MKL, where it does so in float32.

    MKL takes no AVX-512 on AMD's processors; oneDNN does, and is twice as fast there. torch asks it
    only where bfloat16 would be allowed, and where AMX is, oneDNN makes use of that: so products
    are looked at, and MKL stays where they are not exact.

    Returns:
        Whether oneDNN is asked.
    """
    before = torch.get_float32_matmul_precision()
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 128, 128, generator=rng) for _ in range(2))
    torch.set_float32_matmul_precision("medium")
    for x, y in [(a, b), (a.flatten(0, 1), b[0])]:
        exact = x.double() @ y.double()
        if float((x @ y - exact).norm() / exact.norm()) > ROUNDING:
            torch.set_float32_matmul_precision(before)
            return False
    return True

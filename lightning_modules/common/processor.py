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
    multiply_by_onednn()


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
    only where bfloat16 would be allowed, and where AMX is, oneDNN makes use of that: so a product
    is looked at, and MKL stays where it is not exact.

    Returns:
        Whether oneDNN is asked.
    """
    precision = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9
    if precision is None or not torch.backends.mkldnn.is_available():
        return False
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=rng) for _ in range(2))
    exact = a.double() @ b.double()
    precision.fp32_precision = "bf16"
    if float((a @ b - exact).norm() / exact.norm()) < ROUNDING:
        return True
    precision.fp32_precision = "ieee"
    return False

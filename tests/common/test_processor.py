"""What is chosen for a CPU never costs exactness."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lightning_modules.common.processor import multiply_by_onednn


@pytest.mark.parametrize("shape", [(1, 3, 2), (512, 96, 64), (33, 700, 129)])
@pytest.mark.parametrize("batch", [(), (6,)], ids=["one", "many"])
def test_products_are_as_exact_as_float32(
    shape: tuple[int, int, int], batch: tuple[int, ...]
) -> None:
    multiply_by_onednn()
    rng, (rows, inner, columns) = torch.Generator().manual_seed(1), shape
    a, b = (torch.randn(*batch, *s, generator=rng) for s in [(rows, inner), (inner, columns)])
    exact = a.double() @ b.double()
    assert float((a @ b - exact).norm() / exact.norm()) < 1e-6


def test_onednn_is_asked_where_products_stay_exact() -> None:
    before = torch.get_float32_matmul_precision()
    asked = multiply_by_onednn()
    assert torch.get_float32_matmul_precision() == ("medium" if asked else before)


@pytest.mark.parametrize("rounded", [False, True])
def test_an_inexact_product_is_left_to_mkl(rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Tensor.__matmul__

    def product(a: Tensor, b: Tensor) -> Tensor:  # as AMX would, once it is allowed
        allowed = torch.get_float32_matmul_precision() == "medium"
        if a.dtype == torch.float32 and allowed and rounded:
            return exact(a.bfloat16().float(), b.bfloat16().float())
        return exact(a.double(), b.double()).to(a.dtype)

    monkeypatch.setattr(Tensor, "__matmul__", product)
    assert multiply_by_onednn() is not rounded
    assert torch.get_float32_matmul_precision() == ("highest" if rounded else "medium")


def test_memory_is_kept() -> None:
    """A tensor that is freed costs no page faults when it is made again."""
    code = """
import resource, torch
from lightning_modules.common.processor import prepare_cpu
prepare_cpu()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(faults() for _ in range(8)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *others = map(int, done.stdout.split())  # where holes are left it grows once or twice
    assert max(others[-4:]) < first / 10

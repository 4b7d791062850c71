"""What is chosen for a CPU never costs exactness."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lightning_modules.common import processor
from lightning_modules.common.processor import keep_memory, multiply_by_onednn


def test_products_are_as_exact_as_float32() -> None:
    keep_memory()
    multiply_by_onednn()
    rng = torch.Generator().manual_seed(1)
    for rows, inner, columns in [(1, 3, 2), (512, 96, 64), (33, 700, 129)]:
        a, b = (torch.randn(s, generator=rng) for s in [(rows, inner), (inner, columns)])
        exact = a.double() @ b.double()
        assert float((a @ b - exact).norm() / exact.norm()) < 1e-6


def test_an_inexact_product_is_left_to_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    own = SimpleNamespace(fp32_precision="ieee")
    backend = SimpleNamespace(matmul=own, is_available=lambda: True)
    monkeypatch.setattr(processor.torch.backends, "mkldnn", backend)

    def product(a: Tensor, b: Tensor) -> Tensor:  # as AMX would
        return torch.mm(a.bfloat16(), b.bfloat16()).float() if a.dtype == torch.float32 else a.mm(b)

    monkeypatch.setattr(Tensor, "__matmul__", product)
    assert not multiply_by_onednn()
    assert own.fp32_precision == "ieee"


def test_a_torch_without_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor.torch.backends, "mkldnn", SimpleNamespace())
    assert not multiply_by_onednn()

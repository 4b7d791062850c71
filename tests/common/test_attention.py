"""Attention in two products against torch's own kernel, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.common import attention
from lightning_modules.common.attention import attend


def operands(n: int = 7, length: int = 5) -> list[Tensor]:
    rng = torch.Generator().manual_seed(n)
    sizes = [n, length, length]
    return [
        torch.randn(3, 2, size, 4, generator=rng, dtype=torch.float64, requires_grad=True)
        for size in sizes
    ]


def mask_of(kind: str) -> Tensor | None:
    rng = torch.Generator().manual_seed(1)
    if kind == "seen":
        seen = torch.rand(3, 1, 1, 5, generator=rng) > 0.4
        seen[..., 0] = True
        return seen
    if kind == "added":
        return torch.randn(1, 2, 7, 5, generator=rng, dtype=torch.float64)
    return None


@pytest.mark.parametrize("kind", ["seen", "added", "none"])
@pytest.mark.parametrize("small", [2**17, 0], ids=["products", "kernel"])
def test_attention_and_its_gradients(
    kind: str, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SMALL", small)
    q, k, v = operands()
    mask = mask_of(kind)
    ours, theirs = (
        attend(q, k, v, mask),
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    )
    torch.testing.assert_close(ours, theirs)
    weight = torch.arange(ours.numel(), dtype=torch.float64).view_as(ours)
    mine, others = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (ours, theirs))
    for one, other in zip(mine, others, strict=True):
        torch.testing.assert_close(one, other)


def test_causal_attention() -> None:
    q, k, v = operands(5)
    own = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attend(q, k, v, causal=True), own)


def test_a_query_that_sees_nothing_has_zeros() -> None:
    q, k, v = operands()
    seen = torch.ones(3, 1, 1, 5, dtype=torch.bool)
    seen[1] = False
    torch.testing.assert_close(attend(q, k, v, seen)[1], torch.zeros_like(q[1]))
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(attend(q, k, v, seen), theirs)


def test_sixteen_bits_are_added_up_in_float32() -> None:
    q, k, v = (x.detach().bfloat16() for x in operands())
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(attend(q, k, v).double(), exact, atol=1e-2, rtol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        own = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
        assert torch.equal(attend(q.float(), k.float(), v.float()), own)


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    q, k, v = (x.detach() for x in operands())
    mean = torch.stack([attend(q, k, v, dropout=0.3) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, attend(q, k, v), atol=0.08, rtol=0)
    assert not torch.equal(attend(q, k, v, dropout=0.3), attend(q, k, v, dropout=0.3))

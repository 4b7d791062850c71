"""Attention as every network asks for it."""

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 2**17  # queries times keys of a head
EXACT = (torch.float32, torch.float64)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """Scaled dot-product attention, softmax(q k^T / sqrt(d) + mask) v.

    On a CPU short sequences are two matrix products with all weights between them: the blockwise
    kernel of torch multiplies pieces that are too small for the processor. That kernel stays where
    numbers are rounded to 16 bits, which it adds up in float32.

    Args:
        q: [B, heads, N, d].
        k: [B, heads, L, d].
        v: [B, heads, L, d].
        mask: to [B, heads, N, L], bool (True is seen) or float (is added, finite).
        dropout: share of weights that are dropped.
        causal: position n sees 0..n, in place of a mask.

    Returns:
        [B, heads, N, d], zeros where a query sees nothing.
    """
    exact = q.dtype in EXACT and not torch.is_autocast_enabled("cpu")
    if q.device.type == "cpu" and exact and short(q, k) and not causal:
        return products(q, k, v, mask, dropout)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal
    )


def short(q: Tensor, k: Tensor) -> bool:
    """Say whether all weights of a head fit a core's cache."""
    return q.shape[-2] * k.shape[-2] <= SMALL


def products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attend by two matrix products. Arguments as of `attend`."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, heads, N, L]
    if mask is None:
        return F.dropout(scores.softmax(-1), dropout) @ v
    if mask.dtype.is_floating_point:
        return F.dropout((scores + mask).softmax(-1), dropout) @ v
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return (F.dropout(weights, dropout) @ v) * mask.any(-1, keepdim=True)

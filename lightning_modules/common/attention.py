"""Attention as every network asks for it."""

import torch.nn.functional as F
from torch import Tensor

SMALL = 2**17  # queries times keys of a head
UNSEEN = -1e30  # finite: of a row that sees nothing no NaN comes


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
    kernel of torch multiplies pieces that are too small for the processor.

    Args:
        q: [B, heads, N, d].
        k: [B, heads, L, d].
        v: [B, heads, L, d].
        mask: to [B, heads, N, L], bool (True is seen) or float (is added).
        dropout: share of weights that are dropped.
        causal: position n sees 0..n, in place of a mask.

    Returns:
        [B, heads, N, d].
    """
    if q.device.type != "cpu" or causal or q.shape[-2] * k.shape[-2] > SMALL:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal
        )
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, heads, N, L]
    if mask is not None:
        seen = mask.dtype.is_floating_point
        scores = scores + mask if seen else scores.masked_fill(~mask, UNSEEN)
    return F.dropout(scores.softmax(-1), dropout) @ v

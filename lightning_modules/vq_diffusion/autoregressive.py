"""VQ-AR, the autoregressive baseline of VQ-Diffusion: its sampling loop.

The network is the same with a causal mask (Table 3 of arXiv 2111.14822); tokens come one by one in
raster order, drawn from the truncated prediction as in VQ-Diffusion.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_modules.common.categorical import draw_rows
from lightning_modules.common.request import OnStep
from lightning_modules.vq_diffusion.process import Draw, Head, truncate


def sample(
    predict: Callable[[Tensor], Tensor],
    head: Head,
    *,
    x: Tensor,
    draws: Tensor,
    truncation: float = 1.0,
    mask: Tensor | None = None,
    draw: Draw = draw_rows,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw the tokens of a grid one after the other.

    Args:
        predict: x [B, h, w] -> features [B, C] of the next token; called once per position.
        head: [m, C] -> logits [m, K].
        x: [B, h, w] int64, what is known; the rest is not looked at.
        draws: [B, h, w] in [0, 1), for `draw`.
        truncation: truncation rate.
        mask: [B, h, w], 1 = generate, 0 = keep the token of x; None generates all.
        draw: like `draw_rows`.
        on_step: called with the row's number, tokens before and after each row [B, h, w].
    """
    generate = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    x = x.clone()
    for row in range(x.shape[1]):
        before = x.clone() if on_step is not None else x
        for column in range(x.shape[2]):
            features = predict(x)  # [B, C], also where the token is known: it is remembered
            new = generate[:, row, column]
            if bool(new.any()):
                x[new, row, column] = draw(
                    features[new],
                    draws[new, row, column],
                    lambda some: truncate(head(some), truncation),
                )
        if on_step is not None:
            on_step(row, before, x.clone())
    return x

"""Zero-shot editing (section 3.3): pictures larger than the network, and editing without a mask.

Inpainting needs no function of its own: `process.decode` starts from the known tokens, never
changes them, and its schedule runs over the masked ones.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_modules.common.categorical import draw_rows
from lightning_modules.muse.process import Head, Predict, draw_tokens, lowest


def windows(hidden: Tensor, size: tuple[int, int], unit: int = 1) -> list[tuple[int, int]]:
    """Places of windows that together cover all that is to be generated, in order of decoding.

    Each time the next one is, among those with something left to generate, the one with the most
    known tokens up to half a window, and among these the one with the most to generate.

    Args:
        hidden: [H, W] bool, True = to be generated.
        size: height and width of a window, at most H and W.
        unit: what the places are multiples of, as H, W and the size are.

    Returns:
        Top and left of each window.
    """
    (height, width), (h, w) = hidden.shape, size
    tops, lefts = (
        sorted({*range(0, whole - part, max(1, part // 4 // unit) * unit), whole - part})
        for whole, part in ((height, h), (width, w))
    )
    left_over, chosen = hidden.clone(), []
    while bool(left_over.any()):
        best, best_key = (0, 0), (-1, -1)
        for top in tops:
            for left in lefts:
                new = int(left_over[top : top + h, left : left + w].sum())
                key = (min(h * w - new, h * w // 2), new)
                if new and key > best_key:
                    best, best_key = (top, left), key
        left_over[best[0] : best[0] + h, best[1] : best[1] + w] = False
        chosen.append(best)
    return chosen


def outpaint(
    decode: Callable[[Tensor, int, tuple[int, int]], Tensor],
    start: Tensor,
    mask_id: int,
    size: tuple[int, int],
    unit: int = 1,
) -> Tensor:
    """Generate the masked tokens of a canvas that is larger than what a network has positions for.

    Args:
        decode: (tokens [B, h, w] of a window, its number, its top and left) -> the same without
            masks.
        start: [B, H, W] int64, `mask_id` where a token is to be generated.
        mask_id: id of the mask.
        size: height and width of the largest grid that `decode` takes.
        unit: what the places of windows are multiples of.

    Returns:
        [B, H, W] int64; known tokens are unchanged.
    """
    size = (min(size[0], start.shape[1]), min(size[1], start.shape[2]))
    canvas = start.clone()
    for number, (top, left) in enumerate(windows((start == mask_id).any(0).cpu(), size, unit)):
        part = canvas[:, top : top + size[0], left : left + size[1]]
        part.copy_(decode(part.clone(), number, (top, left)))
    return canvas


def rewrite(
    predict: Predict,
    head: Head,
    start: Tensor,
    *,
    mask_id: int,
    places: Tensor,
    draws: Tensor,
    share: float = 0.08,
    top_k: int | None = 3,
    guidance: float = 4.0,
    temperature: float = 1.0,
    draw: Callable[..., Tensor] = draw_rows,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Edit without a mask: draw a random share of the tokens again and again under a new text.

    Args:
        predict: as in `process.decode`.
        head: as in `process.decode`.
        start: [B, h, w] int64 tokens of the picture.
        mask_id: id of the mask.
        places: [T, B, h, w] in [0, 1), whose lowest tokens are drawn in an iteration.
        draws: [T, B, h, w] in [0, 1) for `draw`.
        share: share of the tokens drawn in an iteration, floor(share h w), at least one.
        top_k: draw among so many of the likeliest codes.
        guidance: guidance scale.
        temperature: of the draw; 0 takes the likeliest.
        draw: as in `process.decode`.
        on_step: called with the iteration's number, its input and its result [B, h, w].

    Returns:
        [B, h, w] int64.
    """
    number = torch.full((len(start),), max(1, int(share * start[0].numel())), device=start.device)
    everywhere = torch.ones_like(start, dtype=torch.bool)
    x = start
    for i in range(len(draws)):
        chosen = lowest(places[i], everywhere, number)
        rows = predict(x.masked_fill(chosen, mask_id), guidance, chosen)  # [n, C]
        tokens, _ = draw_tokens(
            rows, draws[i][chosen], head, draw, temperature=temperature, top_k=top_k
        )
        out = x.clone()
        out[chosen] = tokens
        if on_step is not None:
            on_step(i, x, out)
        x = out
    return x

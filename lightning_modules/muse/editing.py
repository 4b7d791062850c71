"""Zero-shot editing (section 3.3): pictures larger than the network, and editing without a mask.

Inpainting needs no function of its own: `process.decode` starts from the known tokens, never
changes them, and its schedule runs over the masked ones.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_modules.common.categorical import draw_rows
from lightning_modules.common.request import OnStep
from lightning_modules.muse.config import EditConfig
from lightning_modules.muse.process import Head, Predict, draw_tokens
from lightning_modules.samplers.loop import lowest


def windows(hidden: Tensor, size: tuple[int, int], unit: int = 1) -> list[tuple[int, int]]:
    """Places of windows that together cover all that is to be generated, in order of decoding.

    Each time the next one is, among those with something left to generate, the one with the most
    known tokens up to half a window, and among these the one with the most to generate.

    Args:
        hidden: [H, W] bool, True = to be generated.
        size: height and width of a window, at most H and W.
        unit: what top and left of the windows are multiples of, as H, W and the size are.
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
        start: [B, H, W] int64, `mask_id` where a token is to be generated; others stay.
        mask_id: id of the mask.
        size: height and width of the largest grid that `decode` takes.
        unit: as in `windows`.
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
    edit: EditConfig,
    *,
    mask_id: int,
    places: Tensor,
    draws: Tensor,
    on_step: OnStep | None = None,
) -> Tensor:
    """Edit without a mask: draw a random share of the tokens again and again under a new text.

    Args:
        predict: as in `process.decode`, like head, mask_id and on_step.
        head: [m, C] -> logits [m, K].
        start: [B, h, w] int64 tokens of the picture.
        edit: draws floor(share h w) tokens in an iteration, at least one.
        mask_id: id of the mask.
        places: [T, B, h, w] in [0, 1), whose lowest tokens are drawn in an iteration.
        draws: [T, B, h, w] in [0, 1) for the draw.
        on_step: called with the iteration's number, its input and its result [B, h, w].
    """
    count = max(1, int(edit.share * start[0].numel()))
    number = torch.full((len(start),), count, device=start.device)
    options: Any = {"temperature": edit.temperature, "top_k": edit.top_k}
    everywhere = torch.ones_like(start, dtype=torch.bool)
    x = start
    for i in range(len(draws)):
        chosen = lowest(places[i], everywhere, number)
        rows = predict(x.masked_fill(chosen, mask_id), edit.guidance, chosen)  # [n, C]
        out = x.clone()
        out[chosen], _ = draw_tokens(rows, draws[i][chosen], head, draw_rows, **options)
        if on_step is not None:
            on_step(i, x, out)
        x = out
    return x

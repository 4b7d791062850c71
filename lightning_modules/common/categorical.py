"""The one categorical draw of the suite: the inverse CDF of given uniforms."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

DRAWN_AT_ONCE = 32  # rows whose probabilities stay in a core's cache
FEW = 1024  # labels that are cumulated one by one
BLOCK = 64  # labels of a block, where there are more


def draw(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
    """Draw one label per row: the number of cumulated probabilities that are <= u.

    token = #{k : sum_{j<=k} softmax(logits / temperature)_j <= u}, as `locate` counts.

    Args:
        logits: [n, K] float, -inf where a label is excluded.
        uniforms: [n] in [0, 1).
        temperature: the logits are divided by it, > 0.

    Returns:
        [n] int64 in 0..K-1; K for a row without probabilities, as NaN and +inf make it.
    """
    if logits.element_size() < 4:
        logits = logits.float()  # sums over thousands of labels need more than 8 or 11 bits
    scaled = logits if temperature == 1 else logits * (1 / temperature)
    return locate(scaled.softmax(1), uniforms)


def locate(p: Tensor, uniforms: Tensor) -> Tensor:
    """The label of each row at which its cumulated probabilities pass u times their sum.

    Of many labels the sums of blocks are cumulated, and then the labels of one block: cumulating
    costs more than the whole softmax.

    Args:
        p: [n, K] probabilities, up to a factor per row; NaN where there are none.
        uniforms: [n] in [0, 1).

    Returns:
        [n] int64 in 0..K-1, never a label of probability 0; K for rows of NaN.
    """
    labels = p.shape[1]
    if labels <= FEW:
        cdf = p.cumsum(1)
        total = cdf[:, -1:].contiguous()
        tokens = _passed(cdf, uniforms.to(p.dtype)[:, None] * total, total)
    else:
        if labels % BLOCK:
            p = pad(p, (0, BLOCK - labels % BLOCK))
        blocks = p.unflatten(1, (-1, BLOCK))
        cdf = blocks.sum(2).cumsum(1)  # [n, blocks]
        total = cdf[:, -1:].contiguous()
        threshold = uniforms.to(p.dtype)[:, None] * total
        block = _passed(cdf, threshold, total).clamp_max(cdf.shape[1] - 1)  # [n, 1]
        rest = threshold - pad(cdf, (1, 0)).gather(1, block)  # less all blocks before
        inside = blocks[torch.arange(len(p), device=p.device), block[:, 0]].cumsum(1)
        tokens = block * BLOCK + _passed(inside, rest, inside[:, -1:].contiguous())
    return torch.where(total > 0, tokens, labels).squeeze(1)


def _passed(cdf: Tensor, threshold: Tensor, total: Tensor) -> Tensor:
    """Entries of each row up to the threshold [n, 1], but no more than come before its total."""
    # u * total may round up to total itself, which lies beyond the last possible label
    found = torch.searchsorted(cdf, threshold, right=True)
    return torch.minimum(found, torch.searchsorted(cdf, total))


def draw_rows(
    rows: Tensor,
    uniforms: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    temperature: float = 1.0,
    logits_filter: Callable[[Tensor], Tensor] | None = None,
    chunk: int = 256,
) -> Tensor:
    """Draw one label per feature row without ever holding more than `chunk` x K numbers.

    Args:
        rows: [n, C] features in front of the output head.
        uniforms: [n] in [0, 1).
        head: maps [m, C] to logits [m, K].
        temperature: as of `draw`; ValueError where it is not positive.
        logits_filter: maps logits [m, K] at temperature 1 to logits with excluded labels at -inf.
        chunk: rows that pass the head at once.

    Raises:
        ValueError: the logits of a row are no numbers.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    tokens, labels = [], 0
    for some, chances in zip(rows.split(chunk), uniforms.split(chunk), strict=True):
        logits = head(some)  # [m, K]
        if logits_filter is not None:
            logits = logits_filter(logits)
        labels = logits.shape[1]
        parts = zip(logits.split(DRAWN_AT_ONCE), chances.split(DRAWN_AT_ONCE), strict=True)
        tokens += [draw(part, u, temperature) for part, u in parts]
    if not tokens:
        return uniforms.new_empty(0, dtype=torch.int64)
    drawn = torch.cat(tokens)
    check_numbers(drawn < labels)
    return drawn


def likeliest(logits: Tensor) -> Tensor:
    """Take the likeliest label per row of [n, K] logits; refuses NaN as `draw_rows` does."""
    tokens = logits.argmax(1)
    check_numbers(~logits.gather(1, tokens[:, None]).squeeze(1).isnan())
    return tokens


def check_numbers(good: Tensor) -> None:
    """Refuse rows [n] that are not good.

    A GPU is waited for, once per step; its callers, who put the tokens in their masked places, wait
    there anyway.
    """
    if not bool(good.all()):
        raise ValueError(
            f"the logits of {int((~good).sum())} of {len(good)} tokens are not finite numbers: "
            "the network diverged, or its weights are damaged or overflow in this precision"
        )

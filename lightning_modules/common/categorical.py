"""The one categorical draw of the suite: the inverse CDF of given uniforms."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

DRAWN_AT_ONCE = 128  # rows that are drawn together on a CPU, whose caches hold them
FEW = 1024  # labels that are cumulated one by one
BLOCK = 64  # labels of a block, where there are more
GPU_ROWS = 2**14  # rows of logits that a GPU holds at once (512 MiB of 8192 codes)


def pieces(rows: Tensor, size: int) -> Sequence[Tensor]:
    """Cut rows [n, ...] into pieces of `size` for a core's cache; else as many as fit a GPU."""
    cached = rows.device.type == "cpu" and not torch.compiler.is_compiling()
    return rows.split(size if cached else max(size, GPU_ROWS))


def draw(logits: Tensor, uniforms: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Draw one label per row: the number of cumulated probabilities that are <= u.

    token = #{k : sum_{j<=k} softmax(logits / temperature)_j <= u}, as `locate` counts.

    Args:
        logits: [n, K] float, -inf where a label is excluded.
        uniforms: [n] in [0, 1).
        temperature: the logits are divided by it, > 0; a tensor [] is not looked at.

    Returns:
        [n] int64 in 0..K-1; K for a row without probabilities, as NaN and +inf make it.
    """
    if logits.element_size() < 4:
        logits = logits.float()  # sums over thousands of labels need more than 8 or 11 bits
    scale = 1 / temperature
    if isinstance(scale, Tensor):
        scaled = logits * scale.to(logits.dtype)
    else:
        scaled = logits if scale == 1 else logits * scale
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
    temperature: float | Tensor = 1.0,
    logits_filter: Callable[[Tensor], Tensor] | None = None,
    chunk: int = 256,
) -> Tensor:
    """Draw one label per feature row without ever holding more than `chunk` x K numbers.

    Arguments as of `drawn_rows`.

    Raises:
        ValueError: the logits of a row are no numbers, or the temperature is not positive.
    """
    options: Any = {"temperature": temperature, "logits_filter": logits_filter}
    drawn, labels = drawn_rows(rows, uniforms, head, chunk=chunk, **options)
    check_numbers(drawn < labels)
    return drawn


def drawn_rows(
    rows: Tensor,
    uniforms: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    temperature: float | Tensor = 1.0,
    logits_filter: Callable[[Tensor], Tensor] | None = None,
    chunk: int = 256,
) -> tuple[Tensor, int]:
    """Draw one label per feature row without a look at what was drawn.

    Args:
        rows: [n, C] features in front of the output head.
        uniforms: [n] in [0, 1).
        head: maps [m, C] to logits [m, K].
        temperature: as of `draw`.
        logits_filter: maps logits [m, K] at temperature 1 to logits with excluded labels at -inf.
        chunk: rows that pass the head at once on a CPU.

    Returns:
        [n] int64 and K, which is also the label of a row whose logits are no numbers.

    Raises:
        ValueError: a temperature that is not positive.
    """
    if not isinstance(temperature, Tensor) and temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    tokens, labels = [], 1
    for some, chances in zip(pieces(rows, chunk), pieces(uniforms, chunk), strict=True):
        logits = head(some)  # [m, K]
        if logits_filter is not None:
            logits = logits_filter(logits)
        labels = logits.shape[1]
        parts = zip(pieces(logits, DRAWN_AT_ONCE), pieces(chances, DRAWN_AT_ONCE), strict=True)
        tokens += [draw(part, u, temperature) for part, u in parts]
    return torch.cat(tokens) if tokens else uniforms.new_empty(0, dtype=torch.int64), labels


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

"""Classifier-free guidance of every paper: null + w (own - null), with w along the way.

Sources: arXiv 2207.12598 (guidance), 2404.07724 (intervals), 2301.00704 (rising scale of Muse),
2507.08965 (ramps and normalisation of discrete guidance).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Law = Literal["linspace", "ratio", "cosine"]
Shares = Sequence[float | Tensor]
"""Weights of the conditions, which sum to 1: all numbers, or all tensors."""


@dataclass(frozen=True)
class Guidance:
    """The guidance scale w along the way; 1 is none, 0 the null alone.

    linspace and ratio: start + (end - start) r. cosine: start + (end - start)
    (1 - cos(pi r^power)) / 2. Outside of the interval of r, w is 1. What r is, `ratio` says: step s
    of T has s / (T - 1) with linspace, whose last step has the end, and s / T with the others.
    """

    start: float = 1.0
    """Scale at the beginning of the way."""
    end: float = 1.0
    """Scale at its end."""
    law: Law = "linspace"
    """How it goes from start to end."""
    power: float = 1.0
    """Exponent of the cosine law."""
    first: float = 0.0
    """The r at which guidance begins."""
    last: float = 1.0
    """The r after which there is none."""
    normalised: bool = True
    """Whether the guided law of discrete tokens is a law again before a posterior reads it. If not,
    its sum Z = sum_k own(k)^w null(k)^(1 - w) scales the rate at which masks open (2507.08965)."""

    @classmethod
    def constant(cls, scale: float, first: float = 0.0, last: float = 1.0) -> "Guidance":
        """The same scale in an interval."""
        return cls(scale, scale, first=first, last=last)

    @property
    def guides(self) -> bool:
        """Whether the null is ever asked."""
        return (self.start, self.end) != (1, 1)

    def at(self, done: Tensor, steps: int | None = None) -> Tensor:
        """Return the scales where shares [n] of the way are done: [n]; arguments as of `ratio`."""
        r = ratio(done, steps, self.law == "linspace")
        share = r
        if self.law == "cosine":
            share = (1 - torch.cos(math.pi * r**self.power)) / 2
        inside = (r >= self.first) & (r <= self.last)
        return torch.where(inside, self.start + (self.end - self.start) * share, 1.0).to(done)

    def scales(self, steps: int) -> list[float]:
        """Return the scales of T steps."""
        if self.law == "linspace":
            shares = [s / max(1, steps - 1) for s in range(steps)]
            scales = torch.linspace(self.start, self.end, steps).tolist()
        else:
            shares = [s / steps for s in range(steps)]
            way = shares
            if self.law == "cosine":
                way = [(1 - math.cos(math.pi * r**self.power)) / 2 for r in shares]
            scales = [self.start + (self.end - self.start) * r for r in way]
        pairs = zip(shares, scales, strict=True)
        return [scale if self.first <= r <= self.last else 1.0 for r, scale in pairs]


def ratio(done: Tensor, steps: int | None, ends: bool) -> Tensor:
    """The r of a call before which a share of the way is done.

    Args:
        done: [n] in [0, 1], s / T before step s of T.
        steps: T; None where pictures go at their own pace, so that nobody knows which call is the
            last: r is `done` itself.
        ends: r = s / (T - 1), which is 1 at the last step; else s / T.

    Returns:
        [n]; with steps in float64, as exact as s and T.
    """
    if steps is None:
        return done
    step = (done.double() * steps).round().clamp(max=steps - 1)
    return step / (max(1, steps - 1) if ends else steps)


def mix(own: Tensor, null: Tensor, scale: float, channels: int | None = None) -> Tensor:
    """null + scale (own - null), of the first channels alone where their number is given.

    Args:
        own: [B, C, ...] prediction under the condition.
        null: [B, C, ...] prediction without.
        scale: 1 is no guidance.
        channels: guide only so many, the first; None guides all.
    """
    if channels is None:
        return null.lerp(own, scale)
    return torch.cat([null[:, :channels].lerp(own[:, :channels], scale), own[:, channels:]], dim=1)


def equals(scale: float | Tensor, value: float) -> bool:
    """Say whether a scale is a number of this value; a tensor is not looked at."""
    return not isinstance(scale, Tensor) and scale == value


def weighted(parts: Tensor, shares: Shares) -> Tensor:
    """Sum the features of several conditions.

    Args:
        parts: [sides, n, C].
        shares: one per side. As tensors, [] or one for every of B pictures [B], compiled code
            serves all of their values.

    Returns:
        [n, C].
    """
    numbers = [share for share in shares if isinstance(share, Tensor)]
    if not numbers:
        return torch.einsum("snc,s->nc", parts, parts.new_tensor(shares))
    weights = torch.stack([n.reshape(-1) for n in numbers]).to(parts.dtype)  # [sides, B or 1]
    pictures = parts.unflatten(1, (weights.shape[1], -1))  # [sides, B, n / B, C]
    return torch.einsum("sbnc,sb->bnc", pictures, weights).flatten(0, 1)


def mixed_rows(ask: Callable[[float, Tensor], Tensor], scales: Tensor, keep: Tensor) -> Tensor:
    """Features of the kept places of n pictures, each guided by its own scale.

    Where all scales are equal this is one call of `ask`. Otherwise the pictures are asked under the
    condition and under the null, each side only by those whose scale gives it a weight.

    Args:
        ask: (scale, pictures [m] of the n) -> features [keep[pictures].sum(), C], guided alike.
        scales: [n].
        keep: [n, ...] bool.

    Returns:
        [keep.sum(), C], in the order of keep.nonzero().
    """
    everyone = torch.arange(len(scales), device=scales.device)
    if bool((scales == scales[0]).all()):
        return ask(float(scales[0]), everyone)
    of = torch.nonzero(keep.flatten(1))[:, 0]  # [m] picture of every row
    weight = scales[of][:, None]
    rows: Tensor | None = None
    for side, needed, share in ((1.0, scales != 0, weight), (0.0, scales != 1, 1 - weight)):
        if bool(needed.any()):
            found = ask(side, everyone[needed])
            part = found.new_zeros(len(of), found.shape[1])
            part[needed[of]] = found
            part = part * share.to(part)
            rows = part if rows is None else rows + part
    assert rows is not None
    return rows

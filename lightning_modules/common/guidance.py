"""Classifier-free guidance of every paper: null + w (own - null), with w along the way.

Sources: arXiv 2207.12598 (guidance), 2404.07724 (intervals), 2301.00704 (rising scale of Muse),
2507.08965 (ramps and normalisation of discrete guidance).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Law = Literal["linspace", "ratio", "cosine"]


@dataclass(frozen=True)
class Guidance:
    """The guidance scale w at every share r of the way; 1 is none, 0 the null alone.

    linspace and ratio: start + (end - start) r, in T steps with r = s / (T - 1) or s / T. cosine:
    start + (end - start) (1 - cos(pi r^power)) / 2, r = s / T. Outside of the interval w is 1.
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
    """Share of the way where guidance begins."""
    last: float = 1.0
    """Share of the way after which there is none."""
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

    def at(self, done: Tensor) -> Tensor:
        """Return the scales at shares of the way, [n] in [0, 1]: [n]."""
        share = done
        if self.law == "cosine":
            share = (1 - torch.cos(math.pi * done**self.power)) / 2
        inside = (done >= self.first) & (done <= self.last)
        return torch.where(inside, self.start + (self.end - self.start) * share, 1.0)

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

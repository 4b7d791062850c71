"""Ordered unmasking: every step opens a number of masks, by one of several orders.

Sources: arXiv 2202.04200 (MaskGIT: confidence), 2209.04439 (Token-Critic), 2503.17076 (Halton),
2510.04525 (the moment sampler); margin and entropy as in the options of shkim0116/KLASS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from lightning_modules.common.seeding import mix_seed
from lightning_modules.samplers.loop import (
    Ask,
    Rows,
    State,
    Stepped,
    draw,
    entropy,
    gumbel,
    log_p,
    lowest,
    spread,
)
from lightning_modules.samplers.settings import Roll


def margin(p: Tensor) -> Tensor:
    """Probability of the likeliest code less that of the second, of probabilities [m, K]: [m]."""
    two = p.topk(2, dim=1).values
    return two[:, 0] - two[:, 1]


SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "max_p": lambda logits, p: p.amax(1),
    "margin": lambda logits, p: margin(p),
    "entropy": lambda logits, p: -entropy(logits, p),
}
"""How sure a network is of places, whatever is drawn there: of logits and probabilities [m, K]."""


@dataclass(frozen=True)
class Ordered(Stepped):
    """Open the surest masks until the kernel's share is masked, at least one in each step.

    confidence: log p of the drawn token plus c (1 - (i + 1) / T) Gumbel noise. max_p, margin,
    entropy: as SCORES. random: any. halton: by ranks. critic: what a Token-Critic says of the
    drawn tokens. moment: the places are chosen first, by Gumbel top-k of log sum_k p(k)^b with
    b = 1 + 1 / (c (1 - (i + 1) / T)), and their tokens drawn from p^b: the law of the confidence
    order where many masks are left, without a draw that is thrown away.
    """

    STREAMS: ClassVar[int] = 2

    order: str = "confidence"
    choice: float = 4.5
    """c, factor of the Gumbel noise, at least 0; confidence and moment."""
    critic: Callable[[Tensor, Tensor], Tensor] | None = None
    """(indices of the pictures [n], tokens [n, N] without masks) -> logits of "real" [n, N]."""

    def memory(self, x: Tensor, generate: Tensor) -> State:
        """Return the number of masks [B], and the pictures' places in the batch."""
        masked = (x == self.kernel.codes).sum(1)
        return {"unknown": masked, "picture": torch.arange(len(x), device=x.device)}

    def left(self, i: int, masked: Tensor, unknown: Tensor) -> Tensor:
        """Masks after step i [n]: floor(unknown C_s), so that each step still to come opens one.

        Args:
            i: number of the step.
            masked: [n] masks before it.
            unknown: [n] masks at the start.
        """
        share = self.kernel.masked_share(self.times(i)[1])
        after = (unknown * share + 1e-6).floor().long().clamp(min=self.steps - 1 - i)
        return torch.minimum(masked - 1, after).clamp(min=0)

    def step(self, i: int, state: State, ask: Ask, u: Tensor) -> tuple[State, Tensor]:
        """Open the masks of step i."""
        x, mask = state["x"], self.kernel.codes
        masked = x == mask
        count = masked.sum(1)
        after = self.left(i, count, state["unknown"])
        time = self.kernel.time_of(count / x.shape[1])
        opened = masked
        planned = self.order in ("random", "halton")
        if planned:  # only what opens is asked about
            plan = u[1] if self.order == "random" else -state["ranks"].float()
            opened = masked & ~lowest(plan, masked, after)
        rows = ask(x, time, self.done(i), opened)
        noise = self.choice * (1 - (i + 1) / self.steps)
        if self.order == "moment":
            opened, tokens = moment(rows, masked, after, noise, u)
            out = x.masked_scatter(opened, tokens)
        else:
            tokens, score = scored(rows, u[0][opened], self.order)
            out = x.masked_scatter(opened, tokens)
            if not planned:
                grid = spread(score, masked, 0.0)
                if self.order == "critic":
                    assert self.critic is not None
                    grid = self.critic(state["picture"], out)
                if self.order == "confidence":
                    grid = grid + noise * gumbel(u[1])
                out = out.masked_fill(lowest(grid, masked, after), mask)
        return {**state, "x": out}, (out != mask).all(1) | self.ends(i, x)


def scored(rows: Rows, uniforms: Tensor, order: str) -> tuple[Tensor, Tensor]:
    """Draw a token per row and say how sure it is: tokens [n] and scores [n]."""

    def measure(logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        p = logits.softmax(1)
        tokens = draw(p, u)
        if order in SCORES:
            return tokens, SCORES[order](logits, p)
        return tokens, log_p(p, tokens) if order == "confidence" else torch.zeros_like(u)

    tokens, score = rows.map(measure, uniforms)
    return tokens, score


def moment(
    rows: Rows, masked: Tensor, after: Tensor, noise: float, u: Tensor
) -> tuple[Tensor, Tensor]:
    """Choose which masks open, then draw their tokens.

    Place i is the first to open with probability sum_k p_i(k)^b over the same sum of all places,
    and its token follows p_i^b, b = 1 + 1 / noise. Where nothing stays masked there is no choice,
    and b = 1.

    Args:
        rows: of all masks.
        masked: [n, N] bool.
        after: [n] masks that stay.
        noise: factor of the Gumbel noise, at least 0; 0 opens the surest places.
        u: [2, n, N] in [0, 1).

    Returns:
        opened [n, N] bool, and their tokens [opened.sum()].
    """
    power = torch.where(after > 0, 1 + 1 / max(noise, 1e-4), 1.0)  # [n]
    b = power[:, None].expand_as(masked)[masked]  # [m]

    def weight(logits: Tensor, b: Tensor) -> tuple[Tensor]:
        return ((logits.log_softmax(1) * b[:, None]).logsumexp(1),)

    key = rows.map(weight, b)[0].double() + gumbel(u[1][masked].double())
    opened = masked & ~lowest(spread(key, masked, 0.0), masked, after)
    chosen = opened[masked]

    def drawn(logits: Tensor, b: Tensor, u: Tensor) -> tuple[Tensor]:
        return (draw((logits * b[:, None]).softmax(1), u),)

    return opened, rows[chosen].map(drawn, b[chosen], u[0][opened])[0]


@dataclass(frozen=True)
class Halton(Ordered):
    """The Halton order, the same for all pictures or rolled by each one's seed."""

    order: str = "halton"
    ranks: Tensor | None = None
    """[B, N] int64 place of every cell in the order."""

    def memory(self, x: Tensor, generate: Tensor) -> State:
        """Return also the ranks."""
        assert self.ranks is not None
        return {**super().memory(x, generate), "ranks": self.ranks.to(x.device)}


def mirrored_cells(numbers: Tensor, base: int, cells: int) -> Tensor:
    """Cell floor(cells Phi(n)) of each number, Phi the digits of n mirrored at the point.

    Phi is the van der Corput sequence; all arithmetic is in integers, so that a cell whose border
    no float can hold is not missed.
    """
    mirrored, rest, scale = torch.zeros_like(numbers), numbers, 1
    while bool(rest.any()):
        mirrored = mirrored * base + rest % base
        rest = rest // base
        scale *= base
    return mirrored * cells // scale


@lru_cache(maxsize=32)
def halton_order(height: int, width: int) -> Tensor:
    """Cells of a grid in the order in which the points of a Halton sequence first visit them.

    Cell of point n: (floor(h Phi_2(n)), floor(w Phi_3(n))), Phi_b the radical inverse. As many
    points are made as it takes to visit every cell; the released code stops at 10,000, which leave
    out 6 cells of a 64x64 grid.

    Returns:
        [h w, 2] int64, row and column.
    """
    points = 4 * height * width
    while True:
        numbers = torch.arange(1, points)
        cells = mirrored_cells(numbers, 2, height) * width + mirrored_cells(numbers, 3, width)
        first = torch.full((height * width,), points)
        first.scatter_reduce_(0, cells, numbers, "amin")
        if bool((first < points).all()):
            order = first.argsort()
            return torch.stack([order // width, order % width], dim=1)
        points *= 2


def halton_ranks(grid: tuple[int, int], seeds: Sequence[int], roll: Roll = "none") -> Tensor:
    """Place of every cell in the Halton order.

    Args:
        grid: height and width in tokens.
        seeds: one per picture.
        roll: none is the one order of the reference (`randomize` false, its default). order begins
            it at a random point per picture, as its `randomize` does; grid shifts its cells over
            the picture, around the borders.

    Returns:
        [B, h, w] int64.
    """
    h, w = grid
    order = halton_order(h, w)
    ranks = torch.empty(h * w, dtype=torch.int64)
    ranks[order[:, 0] * w + order[:, 1]] = torch.arange(h * w)
    images = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(mix_seed(seed, 2))
        down, right = (int(torch.randint(n, (), generator=generator)) for n in grid)
        image = ranks.view(h, w)
        if roll == "grid":
            image = image.roll((down, right), dims=(0, 1))
        elif roll == "order":
            image = (image + down * w + right) % (h * w)
        images.append(image)
    return torch.stack(images)

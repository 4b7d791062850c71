"""Corruption kernels: what noise does to a token, and how it is undone exactly, at any stride.

Sources: arXiv 2107.03006 (D3PM), 2111.14822 (VQ-Diffusion: mask and replace).

Notation, with K codes 0..K-1 and the mask K: a token is kept with probability A, any one code takes
its place with B each, and the mask does with C, so that A + K B + C = 1. Absorbing noise has B = 0,
uniform noise C = 0. Times run from 0, the clean tokens, to 1, pure noise.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.common.categorical import draw_rows
from lightning_modules.common.places import Picked


class Level(NamedTuple):
    """q(x_t | x_0) at one time or several, float64."""

    keep: Tensor
    """A."""
    replace: Tensor
    """B, for each single code."""
    mask: Tensor
    """C."""


@dataclass(frozen=True)
class Kernel:
    """Everything of q(x_s | x_t, x_0), s < t, that does not depend on the tokens.

    A step from s to t keeps a token with a, replaces it by any one code with b each and masks it
    with c. All tensors have one shape: that of the times. The ratios stay finite for B_t = 0, where
    a revealed token is known to be right and stays.
    """

    num_codes: int
    replaces: bool
    """Whether any code can have come by replacement at a time s, B_s > 0."""
    a: Tensor
    b: Tensor
    c: Tensor
    keep: Tensor
    """A_s."""
    replace: Tensor
    """B_s."""
    mask: Tensor
    """C_s."""
    opens: Tensor
    """1 - C_s / C_t: probability that a mask opens, whatever the network says."""
    fresh: Tensor
    """c / C_t, the factor of an opening mask."""
    moved: Tensor
    """b / B_t, the factor of a token that becomes another."""
    back: Tensor
    """B_s / B_t, or its limit 1 / (a + b) where nothing is ever replaced."""
    kept: Tensor
    """A_s / (A_t + B_t)."""
    right: Tensor
    """B_t / (A_t + B_t): share of right tokens that came by replacement."""

    @classmethod
    def between(cls, codes: int, late: Level, early: Level) -> "Kernel":
        """The kernel between two levels: a = A_t / A_s, c = 1 - (1 - C_t) / (1 - C_s), b the rest.

        Args:
            codes: K.
            late: at time t.
            early: at time s; tokens are kept there, A_s > 0.
        """
        a, shown = late.keep / early.keep, (1 - late.mask) / (1 - early.mask)
        none = torch.zeros_like(a)
        b = torch.where(late.replace == 0, none, ((shown - a) / codes).clamp_min(0))
        real = late.keep + late.replace
        return cls(
            codes,
            bool((early.replace > 0).any()),
            a,
            b,
            1 - shown,
            *early,
            opens=1 - _ratio(early.mask, late.mask, none),
            fresh=_ratio(1 - shown, late.mask, none),
            moved=_ratio(b, late.replace, none),
            back=_ratio(early.replace, late.replace, 1 / torch.where(a + b > 0, a + b, 1)),
            kept=_ratio(early.keep, real, none),
            right=_ratio(late.replace, real, none),
        )

    @property
    def stays(self) -> Tensor:
        """a + b, the probability that a real token is the same one step on."""
        return self.a + self.b

    @property
    def stays_wrong(self) -> Tensor:
        """q(x_s = j | x_t = j, x_0 other than j) = (a + b) B_s / B_t."""
        return self.stays * self.back

    @property
    def stays_right(self) -> Tensor:
        """q(x_s = j | x_t = j, x_0 = j) = (a + b) (A_s + B_s) / (A_t + B_t)."""
        return self.stays * (self.kept + self.back * self.right)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Kernel":
        """The same with every tensor changed: picked out by time, viewed, or moved to a device."""
        changed: dict[str, Any] = {
            k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        return replace(self, **changed)


def _ratio(over: Tensor, under: Tensor, empty: Tensor) -> Tensor:
    """over / under, and `empty` where under is 0."""
    nothing = under == 0
    return torch.where(nothing, empty, over / torch.where(nothing, torch.ones_like(under), under))


def posterior(p0: Tensor, x_t: Tensor, kernel: Kernel) -> Tensor:
    """p(x_s | x_t) = sum over k of q(x_s | x_t, x_0 = k) p0_k, in O(K) per position.

    x_t = mask: prob(i) = c / C_t (A_s p_i + B_s S0), prob(mask) = S0 C_s / C_t with S0 = sum p.
    x_t = j: with S = S0 - p_j + p_j B_t / (A_t + B_t),
    prob(i) = b / B_t (A_s p_i + B_s S) for i other than j,
    prob(j) = (a + b) (A_s p_j / (A_t + B_t) + B_s S / B_t), prob(mask) = 0.
    At s = 0 both are p itself. With B = 0 a revealed token stays for certain.

    Args:
        p0: [..., K] probabilities of the clean token; a smaller sum only scales the result.
        x_t: [...] int64 in 0..K.
        kernel: numbers that broadcast to [...].

    Returns:
        [..., K + 1], the mask last.
    """
    n, codes = kernel.map(lambda v: v.to(p0)), kernel.num_codes
    masked = x_t == codes
    j = x_t.clamp_max(codes - 1)[..., None]
    total, own = p0.sum(-1), p0.gather(-1, j).squeeze(-1)
    others = (total - own) + n.right * own
    scale = torch.where(masked, n.fresh, n.moved)
    base = n.replace * torch.where(masked, total, others)
    law = scale[..., None] * (n.keep[..., None] * p0 + base[..., None])
    stays = n.stays * (n.kept * own + n.back * others)
    law = torch.where(masked[..., None], law, law.scatter(-1, j, stays[..., None]))
    closed = torch.where(masked, total * (1 - n.opens), torch.zeros_like(total))
    return torch.cat([law, closed[..., None]], dim=-1)


class Chance(NamedTuple):
    """Uniforms in [0, 1) of one step, each of the tokens' shape."""

    opens: Tensor
    """Which positions change."""
    draws: Tensor
    """What the clean token is."""
    swaps: Tensor
    """Whether and by what it is replaced."""


def swap(uniforms: Tensor, probability: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """With some probability a uniform code 0..codes-1, both from the same uniforms."""
    swapped = uniforms < probability
    share = uniforms / probability.clamp_min(torch.finfo(uniforms.dtype).tiny)
    code = (share.clamp_max(1) * codes).long()
    return swapped, torch.minimum(code, codes - 1)


class Moves(NamedTuple):
    """What `step_back` needs of a kernel of single numbers; numbers, or tensors []."""

    opens: Any
    """1 - C_s / C_t: a mask opens."""
    changes: Any
    """A token that is not the clean one may change."""
    changes_right: Any
    """A token that is the clean one may change."""
    opens_else: Any
    """An opening mask becomes any code, and not the clean one."""
    changes_else: Any
    """A token that changes becomes another code than the clean one."""

    @classmethod
    def of(cls, kernel: Kernel) -> "Moves":
        """The probabilities of a kernel, in float64."""
        others = (kernel.num_codes - 1) * kernel.replace
        return cls(
            float(kernel.opens),
            1 - float(kernel.stays_wrong),
            1 - float(kernel.stays_right),
            float(kernel.num_codes * kernel.replace / (1 - kernel.mask)),
            float(others / (kernel.keep + others)),
        )


def step_back(
    x: Tensor,
    moves: Moves,
    codes: int,
    rows: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    chance: Chance,
    generate: Tensor,
    draw: Callable[..., Tensor] = draw_rows,
    places: Picked | None = None,
) -> Tensor:
    """Draw x_s of p(x_s | x_t), asking the network's output only where a token may change.

    A mask opens with probability 1 - C_s / C_t whatever the prediction is, and a revealed token
    stays with at least (a + b) B_s / B_t; the others are candidates. For them the clean token k is
    drawn from the prediction and x_s from q(x_s | x_t, x_0 = k). This is `posterior` exactly.

    Args:
        x: [...] int64, x_t.
        moves: probabilities of the step.
        codes: K.
        rows: keep [...] bool -> features [keep.sum(), C].
        head: features [m, C] -> logits [m, K].
        chance: the uniforms of this step, each [...].
        generate: [...] bool, where tokens may change.
        draw: like `draw_rows`.
        places: how places are computed.

    Returns:
        [...] int64.
    """
    places = places or Picked()
    opens, changes, changes_right, opens_else, changes_else = (
        n.to(chance.opens.dtype) if isinstance(n, Tensor) else n for n in moves
    )
    candidate = generate & (chance.opens < torch.where(x == codes, opens, changes))
    if not places.any(candidate):
        return x
    clean = draw(rows(candidate), places.pick(chance.draws, candidate), head)  # [n], k
    now, u, v = (places.pick(t, candidate) for t in (x, chance.opens, chance.swaps))
    masked, same = now == codes, now == clean
    probability = torch.where(masked, opens_else, torch.where(same, 1.0, changes_else))
    swapped, code = swap(v, probability, torch.where(masked, codes, codes - 1))
    code = code + (~masked & (code >= now))  # any code but x_t itself
    out = torch.where(swapped, code, clean)
    stays = same & (u >= changes_right)
    return places.put(x, candidate, torch.where(stays, now, out))


def corrupt(tokens: Tensor, mask: Tensor, replaced: Tensor, codes: int, uniforms: Tensor) -> Tensor:
    """Draw x_t of q(x_t | x_0).

    Args:
        tokens: [B, ...] int64 clean tokens.
        mask: [B] float32, C_t.
        replaced: [B] float32, K B / (1 - C): share of replaced tokens among those not masked.
        codes: K.
        uniforms: [2, B, ...] in [0, 1).

    Returns:
        [B, ...] int64, K = mask.
    """
    shape = (-1, *[1] * (tokens.dim() - 1))
    swapped, code = swap(uniforms[1], replaced.view(shape), torch.full_like(tokens, codes))
    shown = torch.where(swapped, code, tokens)
    return torch.where(uniforms[0] < mask.view(shape), codes, shown)


# Kernels of the papers ----


@dataclass(frozen=True)
class Corruption:
    """What training did to tokens, as levels over the time from 0 (clean) to 1 (pure noise)."""

    codes: int
    """K, which is also the id of the mask."""

    def level(self, time: Tensor) -> Level:
        """Return A, B and C at times of any shape."""
        raise NotImplementedError

    def at(self, time: float) -> Level:
        """Return the level at one time."""
        return self.level(torch.tensor(time, dtype=torch.float64))

    def kernel(self, late: float, early: float) -> Kernel:
        """Return the kernel from the time `early` to `late`, exact for any stride."""
        return Kernel.between(self.codes, self.at(late), self.at(early))

    def clean(self, time: float) -> float:
        """Return the clean share A at a time, which the papers call alpha or kappa."""
        return float(self.at(time).keep)

    def masked_share(self, time: float) -> float:
        """Return C at a time over that of pure noise: the masks of a picture that began as such."""
        return float(self.at(time).mask / self.end.mask)

    def time_of(self, noisy: Tensor) -> Tensor:
        """Return the time whose share of noise is nearest to what is given, of any shape."""
        raise NotImplementedError

    @property
    def end(self) -> Level:
        """The level of pure noise."""
        return self.at(1.0)

    @property
    def masks(self) -> bool:
        """Whether pure noise is masks, in the main."""
        return float(self.end.mask) > 0.5

    @property
    def replaced(self) -> float:
        """Share of pure noise that is codes instead of masks."""
        end = self.end
        return float(self.codes * end.replace / (1 - end.keep))

    def noise(self, uniforms: Tensor) -> Tensor:
        """Draw tokens of pure noise.

        Args:
            uniforms: [2, ...] in [0, 1).

        Returns:
            [...] int64.
        """
        code = (uniforms[1] * self.codes).long().clamp_max(self.codes - 1)
        return torch.where(uniforms[0] < self.replaced, code, self.codes)

    def noised(self, tokens: Tensor, time: float, uniforms: Tensor) -> Tensor:
        """Draw x_t for clean tokens [B, ...] with uniforms [2, B, ...]."""
        level = self.at(time)
        shown = 1 - level.mask
        replaced = _ratio(self.codes * level.replace, shown, torch.zeros_like(shown))
        mask, share = (v.to(uniforms).expand(len(tokens)) for v in (level.mask, replaced))
        return corrupt(tokens, mask, share, self.codes, uniforms)


@dataclass(frozen=True)
class Absorbing(Corruption):
    """Masks alone, C = masked(t); Muse, MDLM."""

    masked: Callable[[Tensor], Tensor] = lambda time: time
    """Time -> share of masks, rising from 0 to 1."""

    def level(self, time: Tensor) -> Level:
        """Return A = 1 - C, B = 0 and C."""
        share = self.masked(time).to(torch.float64)
        return Level(1 - share, torch.zeros_like(share), share)

    def time_of(self, noisy: Tensor) -> Tensor:
        """Return the share itself: no network of masks alone is told a time."""
        return noisy


@dataclass(frozen=True)
class Uniform(Corruption):
    """Replaced tokens alone: with probability t by a uniform code; Paella."""

    def level(self, time: Tensor) -> Level:
        """Return A = 1 - t, B = t / K and C = 0."""
        return Level(1 - time, time / self.codes, torch.zeros_like(time))

    def time_of(self, noisy: Tensor) -> Tensor:
        """Return the share itself."""
        return noisy


@dataclass(frozen=True)
class MaskAndReplace(Corruption):
    """Tables of A, B and C at T + 1 even times, the first of clean tokens; VQ-Diffusion."""

    table: Level
    """Each [T + 1] float64 on the CPU."""

    @property
    def steps(self) -> int:
        """Number of times T of the training."""
        return len(self.table.keep) - 1

    def index(self, time: Tensor) -> Tensor:
        """Return the nearest entry of the tables: [...] int64."""
        return (time.double() * self.steps).round().long().clamp(0, self.steps)

    def level(self, time: Tensor) -> Level:
        """Return the entries of the nearest times."""
        at = self.index(time).cpu()
        return Level(*(values[at] for values in self.table))

    def time_of(self, noisy: Tensor) -> Tensor:
        """Return the time at which C is nearest, or 1 - A where noise is not masks."""
        shares = self.table.mask if self.masks else 1 - self.table.keep
        gaps = (shares.to(noisy) - noisy[..., None]).abs()
        return gaps.argmin(-1) / self.steps

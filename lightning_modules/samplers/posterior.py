"""The exact posterior of any kernel at any stride, with a leave-one-out Gibbs corrector.

Sources: arXiv 2107.03006 (D3PM), 2605.22765 (leave-one-out corrector of uniform noise).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_modules.samplers.kernel import Chance, Kernel, Moves, step_back
from lightning_modules.samplers.loop import Ask, State, Stepped, draw, gumbel, lowest, spread


@dataclass(frozen=True)
class Posterior(Stepped):
    """Ancestral sampling: p(x_s | x_t) in even strides of time."""

    STREAMS: ClassVar[int] = 3

    normalised: bool = True
    """Whether guided laws are normalised before they enter the posterior."""

    def step(self, i: int, state: State, ask: Ask, u: Tensor) -> tuple[State, Tensor]:
        """Go from time t to s."""
        late, early = self.times(i)
        kernel = self.kernel.kernel(late, early)
        step = posterior_step if self.normalised else opening_step
        x = step(state, kernel, ask, u, late, self.done(i))
        return {**state, "x": x}, self.ends(i, x)


def opening_step(
    state: State, kernel: Kernel, ask: Ask, u: Tensor, time: float, done: float
) -> Tensor:
    """The same for masks whose guided law is not normalised: it opens them Z times as often.

    At time 0 all open. Arguments as of `posterior_step`, whose noise must not replace tokens.
    """
    x, masked = state["x"], state["x"] == kernel.num_codes
    if not bool(masked.any()):
        return x
    rows = ask(x, time, done, masked)
    assert rows.mass is not None
    rate = spread(rows.mass.double(), masked, 0.0) * float(kernel.opens)
    opened = masked & ((u[0] < rate) | (float(kernel.opens) >= 1))
    return x.masked_scatter(opened, rows[opened[masked]].draw(u[1][opened]))


def posterior_step(
    state: State, kernel: Kernel, ask: Ask, u: Tensor, time: float, done: float
) -> Tensor:
    """Draw x_s of p(x_s | x_t) for the tokens of a state: [n, N].

    Args:
        state: of n pictures.
        kernel: the step.
        ask: the network.
        u: [3, n, N] in [0, 1), as `Chance` names them.
        time: t.
        done: share of the way.
    """
    asked = []

    def rows(keep: Tensor) -> Tensor:
        asked.append(ask(state["x"], time, done, keep))
        return torch.arange(int(keep.sum()), device=keep.device)

    def drawn(places: Tensor, uniforms: Tensor, head: object) -> Tensor:
        return asked[0].draw(uniforms)

    # the rows bring their own head and temperature, and are drawn where `step_back` wants tokens
    chance = Chance(u[0], u[1], u[2])
    moves, codes = Moves.of(kernel), kernel.num_codes
    return step_back(state["x"], moves, codes, rows, lambda r: r, chance, state["generate"], drawn)


def leave_one_out(logits: Tensor, own: Tensor, odds: float) -> Tensor:
    """log p(x_0 | all other tokens) from log p(x_0 | all tokens).

    The token x at the place itself multiplies the probability of x_0 = x by
    q(x | x) / q(x | other) = (A + B) / B = 1 + A / B, which is taken away.

    Args:
        logits: [m, K].
        own: [m] int64, the place's token.
        odds: A / B.

    Returns:
        [m, K] log probabilities.
    """
    less = torch.zeros_like(logits).scatter(1, own[:, None], math.log1p(odds))
    return (logits - less).log_softmax(1)


@dataclass(frozen=True)
class Gibbs(Posterior):
    """The exact posterior, and after each step but the last some places drawn anew.

    At time s the law of a real token given all others is C(k) = A p_loo(k) + B over its sum. The
    places that are drawn of it are those whose tokens it finds least likely: Gumbel top-k of
    -(log C(x) - max over others of log C) / tau. Chosen at random (tau None), one at a time, the
    corrector leaves the noisy law as it is.
    """

    STREAMS: ClassVar[int] = 5

    corrections: int = 1
    """Corrector calls after each step but the last."""
    places: int = 1
    """Tokens drawn anew in one of them."""
    tau: float | None = 1.0
    """Temperature of the choice; None chooses at random."""

    @property
    def told(self) -> list[float]:
        """Return the times, each but the first once more for every corrector call there."""
        first, *others = super().told
        return [first, *(t for t in others for _ in range(1 + self.corrections))]

    def step(self, i: int, state: State, ask: Ask, u: Tensor) -> tuple[State, Tensor]:
        """Go from time t to s and correct there; the corrections are steps of their own."""
        stride, at = divmod(i, 1 + self.corrections)
        late, early = self.times(stride)
        done = self.done(stride)
        if at == 0:
            kernel = self.kernel.kernel(late, early)
            x = posterior_step(state, kernel, ask, u, late, done)
        else:
            x = self.corrected(state, ask, u[3:], early, done)
        return {**state, "x": x}, self.ends(stride, x)

    def corrected(self, state: State, ask: Ask, u: Tensor, time: float, done: float) -> Tensor:
        """Draw some places anew at a time, with u [2, n, N]: [n, N]."""
        x, codes = state["x"], self.kernel.codes
        candidates = state["generate"] & (x != codes)
        if not bool(candidates.any()):
            return x
        keep, replaced, _ = (
            float(v) for v in self.kernel.level(torch.tensor(time, dtype=torch.float64))
        )
        rows = ask(x, time, done, candidates)
        key = gumbel(u[1].double())
        if self.tau is not None:

            def measure(logits: Tensor, own: Tensor) -> tuple[Tensor]:
                return (surplus(logits, own, keep, replaced),)

            (found,) = rows.map(measure, x[candidates])
            key = key - spread(found.double(), candidates, 0.0) / self.tau
        count = candidates.sum(1)
        chosen = candidates & ~lowest(key, candidates, (count - self.places).clamp(min=0))

        def drawn(logits: Tensor, own: Tensor, u: Tensor) -> tuple[Tensor]:
            return (draw(conditional(logits.double(), own, keep, replaced).softmax(1), u),)

        tokens = rows[chosen[candidates]].map(drawn, x[chosen], u[0][chosen])[0]
        return x.masked_scatter(chosen, tokens)


def surplus(logits: Tensor, own: Tensor, keep: float, replaced: float) -> Tensor:
    """log C(x) - max over others of log C, C as in `conditional`, of present tokens x: [m].

    With S the sum of p over all others, C(k) = A p(k) / Z + B and C(x) = A p(x) / (1 + A / B) / Z
    + B, Z = S + p(x) / (1 + A / B). Arguments as of `conditional`.
    """
    p = logits.softmax(1)
    less = p.gather(1, own[:, None]) / (1 + keep / replaced)
    p = p.scatter_(1, own[:, None], 0)  # S is no difference, of which little would be left
    z = p.sum(1, keepdim=True) + less
    there, other = (keep * share / z + replaced for share in (less, p.amax(1, keepdim=True)))
    return (there.log() - other.log()).squeeze(1)


def conditional(logits: Tensor, own: Tensor, keep: float, replaced: float) -> Tensor:
    """log of A p_loo(k) + B, the law of a real token given all others up to its sum: [m, K].

    Args:
        logits: [m, K] of the clean token given all tokens.
        own: [m] int64 present tokens.
        keep: A.
        replaced: B, above 0.
    """
    return (keep * leave_one_out(logits, own, keep / replaced).exp() + replaced).log()

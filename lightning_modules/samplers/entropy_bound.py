"""Entropy-bounded sampling with an adaptive stop (arXiv 2505.24857): easy pictures end sooner."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_modules.samplers.loop import Ask, Sampler, State, entropy, spread


def within_bound(uncertainty: Tensor, candidates: Tensor, gamma: float) -> Tensor:
    """The longest prefix of the surest candidates whose entropies keep the bound.

    Sorted by entropy, candidates are accepted while (sum of H) - (largest H) <= gamma, which bounds
    what drawing them independently can cost in KL. The surest is always accepted.

    Args:
        uncertainty: [n, N] entropies in nats.
        candidates: [n, N] bool.
        gamma: the bound, at least 0.

    Returns:
        [n, N] bool.
    """
    ranked, order = uncertainty.double().masked_fill(~candidates, torch.inf).sort(dim=1)
    finite = torch.where(ranked.isfinite(), ranked, 0.0)
    fits = (finite.cumsum(1) - finite <= gamma) & ranked.isfinite()
    return torch.zeros_like(fits).scatter(1, order, fits)


@dataclass(frozen=True)
class EntropyBound(Sampler):
    """Masks open as many at a time as the bound allows; at gamma 0 one by one, which is exact."""

    gamma: float = 0.1
    """Bound in nats, at least 0."""
    limit: int = 48
    """Most calls; the last one opens everything."""

    @property
    def told(self) -> list[float]:
        """Return even times."""
        return [1 - i / self.limit for i in range(self.limit)]

    def step(self, i: int, state: State, ask: Ask, u: Tensor) -> tuple[State, Tensor]:
        """Open the masks that the bound allows."""
        x, mask = state["x"], self.kernel.codes
        masked = x == mask
        share = masked.sum(1) / x.shape[1]
        done = 1 - masked.sum(1) / state["generate"].sum(1)
        rows = ask(x, self.kernel.time_of(share), done, masked)
        opened = masked
        if i < self.limit - 1:
            (h,) = rows.map(lambda logits: (entropy(logits),))
            opened = within_bound(spread(h, masked, 0.0), masked, self.gamma)
        out = x.masked_scatter(opened, rows[opened[masked]].draw(u[0][opened]))
        return {**state, "x": out}, (out != mask).all(1)


@dataclass(frozen=True)
class EntropyBoundUniform(EntropyBound):
    """The form for uniform noise (DiffusionGemma's): what is not accepted becomes fresh noise.

    All places are scored in every call. A picture is finished when its mean entropy is below `calm`
    and its likeliest tokens are those of the call before; the last call accepts everything. The
    network is told the share that was not accepted.
    """

    STREAMS: ClassVar[int] = 2

    calm: float = 0.005
    """Mean entropy in nats below which a picture may be finished."""

    def memory(self, x: Tensor, generate: Tensor) -> State:
        """Return the likeliest tokens [B, N], which nothing is equal to, and the share of noise."""
        share = generate.sum(1) / x.shape[1]
        return {"likeliest": torch.full_like(x, -1), "noise": share.float()}

    def step(self, i: int, state: State, ask: Ask, u: Tensor) -> tuple[State, Tensor]:
        """Accept what the bound allows, and renoise the rest."""
        x, generate = state["x"], state["generate"]
        total = generate.sum(1)
        done = 1 - state["noise"] * x.shape[1] / total
        rows = ask(x, state["noise"], done, generate)

        h, likeliest = rows.map(lambda logits: (entropy(logits), logits.argmax(1)))
        best = x.masked_scatter(generate, likeliest)
        uncertainty = spread(h, generate, 0.0)
        calm = uncertainty.sum(1) / total < self.calm
        stable = (best == state["likeliest"]).all(1)
        finished = (calm & stable) | (i >= self.limit - 1)
        accepted = within_bound(uncertainty, generate, self.gamma) | finished[:, None]
        accepted = accepted & generate
        tokens = rows[accepted[generate]].draw(u[0][accepted])
        drawn = x.masked_scatter(accepted, tokens)
        fresh = (u[1] * self.kernel.codes).long().clamp_max(self.kernel.codes - 1)
        out = torch.where(accepted | ~generate, drawn, fresh)
        noise = (generate & ~accepted).sum(1) / x.shape[1]
        return {**state, "x": out, "likeliest": best, "noise": noise}, finished

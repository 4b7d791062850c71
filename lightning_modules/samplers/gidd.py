"""GIDD's self-correction (arXiv 2503.04482): the network mends its own tokens after sampling."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.samplers.loop import Ask, State, draw, lowest, spread
from lightning_modules.samplers.posterior import Posterior


@dataclass(frozen=True)
class SelfCorrection(Posterior):
    """The exact posterior, then one call after the other that rewrites the surest other token.

    A call at the low noise `level` draws z' of softmax(logits / temperature), scores a place by
    p(z') where z' is another token than there is, and writes the `places` best. A picture is
    finished when nothing changed, when the share of tokens that are the likeliest has not risen
    for more than `patience` calls, or after `corrections` calls.
    """

    corrections: int = 128
    """Most calls after sampling."""
    places: int = 1
    """Tokens rewritten in one of them."""
    temperature: float = 0.1
    """Temperature of the rewriting."""
    level: float = 0.01
    """Time that the network is told."""
    patience: int = 32
    """Calls in a row without a better share."""

    @property
    def told(self) -> list[float]:
        """Return the times of sampling and of all corrections."""
        return super().told + [self.level] * self.corrections

    def memory(self, x: Tensor, generate: Tensor) -> State:
        """Return the best share of likeliest tokens so far [B], and the calls since [B]."""
        return {
            "best": torch.zeros(len(x), device=x.device),
            "waited": torch.zeros(len(x), dtype=torch.int64, device=x.device),
        }

    def step(self, i: int, state: State, ask: Ask, u: Tensor) -> tuple[State, Tensor]:
        """Sample in the first steps, correct in those after."""
        if i < self.steps:
            state, finished = super().step(i, state, ask, u)
            return state, finished & (self.corrections == 0)
        x, generate = state["x"], state["generate"]
        rows = ask(x, self.level, 1.0, generate).at(self.temperature)

        def measure(logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            p = logits.softmax(1)
            tokens = draw(p, u)
            return tokens, p.gather(1, tokens[:, None]).squeeze(1), logits.argmax(1)

        tokens, p, likeliest = rows.map(measure, u[0][generate])
        other = x.masked_scatter(generate, tokens)
        score = spread(p, generate, 0.0) * (other != x)
        # of no other token all scores are 0, and writing what is there changes nothing
        count = generate.sum(1)
        chosen = generate & ~lowest(score, generate, (count - self.places).clamp(min=0))
        out = torch.where(chosen, other, x)
        right = (out == x.masked_scatter(generate, likeliest)) & generate
        share = right.sum(1) / count
        better = share > state["best"]
        waited = torch.where(better, 0, state["waited"] + 1)
        finished = (out == x).all(1) | (waited > self.patience)
        finished = finished | (i >= self.steps + self.corrections - 1)
        best = torch.where(better, share, state["best"])
        # a picture that has lost its patience keeps the tokens of the call before
        out = torch.where((waited > self.patience)[:, None], x, out)
        return {**state, "x": out, "best": best, "waited": waited}, finished

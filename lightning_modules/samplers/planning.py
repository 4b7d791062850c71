"""Path planning, P2 (arXiv 2502.03540): what stays open is planned anew at every step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_modules.samplers.loop import Ask, State, Stepped, draw, log_p, lowest, spread


@dataclass(frozen=True)
class PathPlanning(Stepped):
    """Draw every place, score masks by log p of their draw and visible ones by eta times that.

    The floor(N (1 - kappa)) lowest are masked, kappa the visible share after the step; masks among
    the others open. A visible place that stays keeps its token, though its score is that of a new
    draw. eta 0 never masks again, 1 plans freely, more plans more. A `critic` scores visible
    places instead, by log sigmoid of what it says of the drawn tokens, and nothing visible is asked
    of the network.
    """

    STREAMS: ClassVar[int] = 1

    eta: float = 1.0
    """Weight of the scores of visible places, at least 0."""
    critic: Callable[[Tensor, Tensor], Tensor] | None = None
    """(indices of the pictures [n], tokens [n, N] without masks) -> logits of "real" [n, N]."""

    def memory(self, x: Tensor, generate: Tensor) -> State:
        """Return the masks at the start [B, N], and the pictures' places in the batch."""
        return {"free": x == self.kernel.codes, "picture": torch.arange(len(x), device=x.device)}

    def step(self, i: int, state: State, ask: Ask, u: Tensor) -> tuple[State, Tensor]:
        """Open and mask again."""
        x, mask, free = state["x"], self.kernel.codes, state["free"]
        masked = x == mask
        asked = masked if self.critic is not None else free
        if not bool(asked.any()):
            return state, self.ends(i, x)
        rows = ask(x, self.kernel.time_of(masked.sum(1) / x.shape[1]), self.done(i), asked)

        def measure(logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            p = logits.softmax(1)
            tokens = draw(p, u)
            return tokens, log_p(p, tokens)

        tokens, sure = rows.map(measure, u[0][asked])
        drawn, scores = x.masked_scatter(asked, tokens), spread(sure.double(), asked, 0.0)
        if self.critic is not None:
            found = torch.nn.functional.logsigmoid(self.critic(state["picture"], drawn).double())
            scores = torch.where(masked, scores, found)
        scores = torch.where(masked, scores, self.eta * scores)
        share = self.kernel.masked_share(self.times(i)[1])
        count = (free.sum(1) * share + 1e-9).floor().long()
        again = lowest(scores, free, count)
        out = torch.where(masked, drawn, x).masked_fill(again, mask)
        return {**state, "x": out}, self.ends(i, x)

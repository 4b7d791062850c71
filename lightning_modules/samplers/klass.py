"""KLASS (shkim0116/KLASS): masks open when the network is sure of them and has stopped changing."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_modules.samplers.loop import Ask, State, Stepped, draw, lowest, spread

LEAST = 1e-12  # added to probabilities in their logarithms, as released


@dataclass(frozen=True)
class KLASS(Stepped):
    """Open all masks whose prediction is stable and sure, else the surest ones of an even share.

    Stable: KL(p || p of the call before) < kl in each of the last `history` calls. Sure: the drawn
    token's probability is above `sure`. Where no mask is both, the step opens its share of all
    masks, N / T, the first ones rounded up. The probabilities of a call before are kept: [n, N, K].
    """

    STREAMS: ClassVar[int] = 1

    kl: float = 0.01
    """Largest KL in nats of a stable place."""
    sure: float = 0.9
    """Probability above which a token is sure."""
    history: int = 2
    """Calls for which a place must be stable."""

    @property
    def pace(self) -> int | None:
        """Return None: pictures go at the pace of what they are sure of."""
        return None

    def memory(self, x: Tensor, generate: Tensor) -> State:
        """Return the masks at the start [B], their probabilities and the KLs of the last calls."""
        codes = self.kernel.codes
        shape = (*x.shape, codes)
        return {
            "unknown": (x == codes).sum(1),
            "before": torch.zeros(shape, device=x.device),
            "kl": torch.full((*x.shape, self.history), torch.inf, device=x.device),
        }

    def step(self, i: int, state: State, ask: Ask, u: Tensor) -> tuple[State, Tensor]:
        """Open what is ready."""
        x, mask = state["x"], self.kernel.codes
        masked = x == mask
        time = self.kernel.time_of(masked.sum(1) / x.shape[1])
        done = 1 - masked.sum(1) / state["unknown"]
        rows = ask(x, time, done, masked)

        def measure(logits: Tensor, u: Tensor, before: Tensor) -> tuple[Tensor, ...]:
            p = logits.softmax(1)
            tokens = draw(p, u)
            kl = (p * ((p + LEAST).log() - (before + LEAST).log())).sum(1)
            return tokens, p.gather(1, tokens[:, None]).squeeze(1), kl, p.to(before)

        tokens, sure, kl, p = rows.map(measure, u[0][masked], state["before"][masked])
        last = spread(kl.to(state["kl"]), masked, torch.inf)
        history = torch.cat([state["kl"][..., 1:], last[..., None]], dim=-1)
        confidence = spread(sure, masked, 0.0)
        ready = masked & (history < self.kl).all(-1) & (confidence > self.sure)
        share = state["unknown"] // self.steps + (i < state["unknown"] % self.steps)
        share = masked.sum(1) if i >= self.steps - 1 else share
        surest = masked & ~lowest(confidence, masked, (masked.sum(1) - share).clamp(min=0))
        opened = torch.where(ready.any(1, keepdim=True), ready, surest)
        out = torch.where(opened, x.masked_scatter(masked, tokens), x)
        before = state["before"].clone()
        before[masked] = p
        kept = {"before": before, "kl": history, "x": out}
        return {**state, **kept}, (out != mask).all(1)

"""Paella's renoising (arXiv 2211.07292): draw every token, then put noise back at a lower rate."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_modules.samplers.loop import Ask, State, Stepped

Mode = Literal["start", "prev", "rand"]


@dataclass(frozen=True)
class Renoise(Stepped):
    """Replace drawn tokens with the rate of the next time, nothing after the last step.

    Which places get noise does not depend on the draw, so that only the others are drawn.
    """

    STREAMS: ClassVar[int] = 3

    mode: Mode = "start"
    """Noise: that of the start, the step's own input (prev), or fresh tokens (rand)."""

    def memory(self, x: Tensor, generate: Tensor) -> State:
        """Return the noise of the start [B, N]."""
        return {"noise": x}

    def step(self, i: int, state: State, ask: Ask, u: Tensor) -> tuple[State, Tensor]:
        """Draw and renoise."""
        x, (late, early) = state["x"], self.times(i)
        share = 1 - self.kernel.clean(early)
        noisy = state["generate"] & (u[1] < share)
        keep = state["generate"] & ~noisy
        out = x
        if bool(keep.any()):
            out = x.masked_scatter(keep, ask(x, late, self.done(i), keep).draw(u[0][keep]))
        if self.mode == "start":
            out = torch.where(noisy, state["noise"], out)
        elif self.mode == "rand":
            fresh = (u[2] * self.kernel.codes).long().clamp_max(self.kernel.codes - 1)
            out = torch.where(noisy, fresh, out)
        return {**state, "x": out}, self.ends(i, x)

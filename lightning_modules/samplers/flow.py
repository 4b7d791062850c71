"""Discrete flow matching: jumps along a velocity, with a divergence-free term (arXiv 2407.15595).

kappa is the clean share. With x_1 drawn of the prediction and w = kappa' / (1 - kappa) the velocity
is w (d_x1 - d_x) + c [w (d_x1 - d_x) - kappa' / kappa (d_x - source)]; its second part moves
nothing on the whole. (facebookresearch/flow_matching: solver/discrete_solver.py.)
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_modules.samplers.loop import Ask, State, Stepped


@dataclass(frozen=True)
class Flow(Stepped):
    """Jump with 1 - exp(-h lambda), lambda the rate of leaving; in the last step take x_1."""

    STREAMS: ClassVar[int] = 4

    divergence_free: float = 0.0
    """Factor of c."""
    law: Literal["constant", "bump"] = "constant"
    """c: constant, or times kappa^2 (1 - kappa)^(1/4)."""

    def churn(self, kappa: float) -> float:
        """Return c at a clean share; 0 at pure noise, which has nothing to give back."""
        if kappa <= 0:
            return 0.0
        return self.divergence_free * (
            kappa**2 * (1 - kappa) ** 0.25 if self.law == "bump" else 1.0
        )

    def rates(self, kappa: float, grown: float) -> tuple[float, float]:
        """Return h times the rates from x to x_1 and from x to the source.

        Args:
            kappa: clean share before the step, below 1.
            grown: what the step adds to it, h kappa'.
        """
        c = self.churn(kappa)
        return (1 + c) * grown / (1 - kappa), c * grown / kappa if c else 0.0

    def step(self, i: int, state: State, ask: Ask, u: Tensor) -> tuple[State, Tensor]:
        """Jump, or not, at every place."""
        x, generate, codes = state["x"], state["generate"], self.kernel.codes
        late, early = self.times(i)
        kappa, grown = self.kernel.clean(late), self.kernel.clean(early) - self.kernel.clean(late)
        towards, backwards = self.rates(kappa, grown)
        masked = x == codes
        replaced = self.kernel.replaced
        own = torch.where(masked, 1 - replaced, replaced / codes)  # the source's share of x itself
        back = backwards * (1 - own)
        # where noise is masks alone, a visible token is its own prediction
        asked = generate & (masked if replaced == 0 else torch.ones_like(masked))
        last = i >= self.steps - 1
        if not last:  # whatever is predicted, nothing else can jump
            asked = asked & (u[1] < -torch.expm1(-(towards + back)))
        clean = x
        if bool(asked.any()):
            rows = ask(x, late, self.done(i), asked)
            clean = x.masked_scatter(asked, rows.draw(u[0][asked]))
        if last:
            return {**state, "x": torch.where(generate, clean, x)}, self.ends(i, x)
        forward = towards * (clean != x)
        total = forward + back
        jumps = generate & (u[1] < -torch.expm1(-total))
        to_clean = u[2] * total < forward
        target = torch.where(to_clean, clean, self.other(x, u[3]))
        return {**state, "x": torch.where(jumps, target, x)}, self.ends(i, x)

    def other(self, x: Tensor, uniforms: Tensor) -> Tensor:
        """Draw of the source what is not x itself [n, N]."""
        codes, replaced = self.kernel.codes, self.kernel.replaced
        masked = x == codes
        to_mask = torch.where(masked, 0.0, (1 - replaced) / (1 - replaced / codes))
        count = torch.where(masked, codes, codes - 1)
        share = ((uniforms - to_mask) / (1 - to_mask).clamp_min(1e-12)).clamp(0, 1)
        code = torch.minimum((share * count).long(), count - 1)
        code = code + (~masked & (code >= x))
        return torch.where(uniforms < to_mask, codes, code)

"""ReMDM (arXiv 2503.00307; kuleshov-group/remdm): opened tokens are masked again at some rate.

With sigma the probability that a visible token is masked, a mask opens with
(alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), so that the visible share stays alpha_s whatever
sigma is, as long as sigma <= min(1, (1 - alpha_s) / alpha_t).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_modules.samplers.loop import Ask, State, Stepped, draw

Rule = Literal["none", "cap", "rescale", "conf", "loop"]


@dataclass(frozen=True)
class ReMDM(Stepped):
    """Ancestral sampling of masks with remasking; with rule none it is MDLM's.

    cap: sigma = min(eta, sigma_max). rescale: eta sigma_max. conf: sigma_max times the softmax over
    visible tokens of minus the probability with which each was opened. loop: as none, but alpha
    stays at `level` while t is in (off, on], where sigma = eta.
    """

    STREAMS: ClassVar[int] = 2

    rule: Rule = "cap"
    eta: float = 0.02
    """Rate of masking again, in [0, 1]."""
    on: float = 0.55
    """loop: time at which it begins."""
    off: float = 0.05
    """loop: time at which it ends."""
    level: float = 0.9
    """loop: visible share in it."""

    def memory(self, x: Tensor, generate: Tensor) -> State:
        """Return minus the probability of each token at its opening; -inf where none was opened."""
        return {"doubt": torch.full(x.shape, -torch.inf, device=x.device)}

    def visible(self, time: float) -> float:
        """Return alpha, the visible share at a time."""
        if self.rule != "loop":
            return 1 - self.kernel.masked_share(time)
        if time > self.on:
            return (1 - time) * self.level / (1 - self.on)
        if time <= self.off:
            return 1 - time * (1 - self.level) / self.off
        return self.level

    def levels(self, late: float, early: float) -> tuple[float, float]:
        """Return alpha at both ends of a step; in the loop it does not move, at time 0 it is 1."""
        if self.rule == "loop" and early > 0:
            if self.off < late <= self.on:
                return self.level, self.level
            if late > self.on:  # the ramp of the step's beginning holds to its end
                return self.visible(late), min(1.0, (1 - early) * self.level / (1 - self.on))
        return self.visible(late), self.visible(early)

    def rate(self, late: float, early: float) -> float:
        """Return the sigma that all places share, at most sigma_max; that of a mask with conf is 0.

        Args:
            late: time before the step.
            early: time after it.
        """
        alpha_t, alpha_s = self.levels(late, early)
        most = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0
        if self.rule == "rescale":
            return self.eta * most
        looping = self.rule == "loop" and self.off < late <= self.on
        return min(self.eta, most) if self.rule == "cap" or looping else 0.0

    def remasking(self, late: float, early: float, doubt: Tensor) -> Tensor:
        """Return sigma of visible tokens [n, N], from what `memory` says of them."""
        if self.rule != "conf":
            return torch.full_like(doubt, self.rate(late, early))
        alpha_t, alpha_s = self.levels(late, early)
        most = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0
        return doubt.softmax(1).nan_to_num() * most

    def step(self, i: int, state: State, ask: Ask, u: Tensor) -> tuple[State, Tensor]:
        """Open masks and mask opened tokens again."""
        x, mask, generate = state["x"], self.kernel.codes, state["generate"]
        masked, (late, early) = x == mask, self.times(i)
        alpha_t, alpha_s = self.levels(late, early)
        sigma = self.remasking(late, early, state["doubt"])
        opens = (alpha_s - (1 - self.rate(late, early)) * alpha_t) / (1 - alpha_t)
        opened = masked & (u[1] < opens)
        again = ~masked & generate & (u[1] >= 1 - sigma)
        out, doubt = x.masked_fill(again, mask), state["doubt"].masked_fill(again, -torch.inf)
        if bool(opened.any()):
            time = self.kernel.time_of(masked.sum(1) / x.shape[1])
            rows = ask(x, time, self.done(i), opened)

            def measure(logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
                p = logits.softmax(1)
                tokens = draw(p, u)
                return tokens, -p.gather(1, tokens[:, None]).squeeze(1)

            tokens, less = rows.map(measure, u[0][opened])
            out = out.masked_scatter(opened, tokens)
            doubt = doubt.masked_scatter(opened, less.to(doubt))
        return {**state, "x": out, "doubt": doubt}, self.ends(i, x)

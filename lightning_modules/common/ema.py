"""Exponential moving averages of a generator's weights: in training, or over its checkpoints."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_modules.common.blocks import like, local


class WeightAverage:
    """Keeps shadow = decay * shadow + (1 - decay) * weight for every tensor of some modules.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that the first
    random weights are soon forgotten. Frozen encoders are not among the modules and so never
    copied. Buffers are copied as they are. Of sharded weights every device averages its part.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the shadow towards the module's present weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        state = module.state_dict()
        self.shadow = {k: v.to(state[k].device) for k, v in self.shadow.items()}
        moving = [k for k, v in state.items() if v.is_floating_point()]
        shadow = [local(self.shadow[k]) for k in moving]
        weights = [local(state[k]) for k in moving]
        torch._foreach_lerp_(shadow, weights, 1 - decay)
        for k in state.keys() - set(moving):
            self.shadow[k].copy_(state[k])

    @torch.no_grad()
    def exchange(self, module: nn.Module) -> None:
        """Let the module's tensors and the shadow change places; twice changes nothing."""
        for k, v in module.state_dict().items():
            weight, shadow = local(v), local(self.shadow[k])
            kept = weight.clone()
            weight.copy_(shadow)
            shadow.copy_(kept)

    def state_dict(self) -> dict[str, Tensor | int | dict[str, Tensor]]:
        """Return what a checkpoint keeps."""
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` returned, sharded as the weights are."""
        self.updates = state["updates"]
        self.shadow = {k: like(v, self.shadow[k]) for k, v in state["shadow"].items()}


def offline_average(states: Iterable[Mapping[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """Average a series of checkpoints: a_1 = w_1, a_k = decay a_(k-1) + (1 - decay) w_k.

    Muse has no average in training and this one after it (arXiv 2301.00704: a checkpoint every
    5000 steps, decay 0.7). Tensors without floating-point numbers are the last checkpoint's.
    The states are read one after the other; sums are float32 or wider, results of the types they
    had.

    Raises:
        ValueError: no checkpoint, a decay out of range, or tensors that do not match.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
    average: dict[str, Tensor] = {}
    types: dict[str, torch.dtype] = {}
    for number, state in enumerate(states, 1):
        if number == 1:
            types = {k: v.dtype for k, v in state.items()}
        odd = types.keys() ^ state.keys()
        odd |= {k for k in average.keys() & state.keys() if average[k].shape != state[k].shape}
        if odd:
            raise ValueError(f"checkpoint {number} does not match the first: {min(odd)}")
        for k, v in state.items():
            wide = v.float() if v.is_floating_point() and v.dtype.itemsize < 4 else v
            moves = number > 1 and v.is_floating_point()
            average[k] = average[k].lerp(wide, 1 - decay) if moves else wide
    if not types:
        raise ValueError("there is no checkpoint to average")
    return {k: v.to(types[k]) for k, v in average.items()}

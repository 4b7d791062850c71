"""Exponential moving average of a generator's trainable weights."""

import torch
from torch import Tensor, nn


class WeightAverage:
    """Keeps shadow = decay * shadow + (1 - decay) * weight for every tensor of some modules.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that the first
    random weights are soon forgotten. Frozen encoders are not among the modules and so never
    copied. Buffers are copied as they are.
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
        torch._foreach_lerp_(
            [self.shadow[k] for k in moving], [state[k] for k in moving], 1 - decay
        )
        for k in state.keys() - set(moving):
            self.shadow[k].copy_(state[k])

    def state_dict(self) -> dict[str, Tensor | int | dict[str, Tensor]]:
        """Return what a checkpoint keeps."""
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` returned."""
        self.updates, self.shadow = state["updates"], dict(state["shadow"])

"""AdamW with a linear warm-up, as most of the papers use it."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lightning_modules.common.config import OptimConfig


def adamw(config: OptimConfig, modules: Iterable[nn.Module]) -> torch.optim.AdamW:
    """Make AdamW over all trainable parameters of `modules`."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if config.decay_all or p.ndim >= 2]},
        {
            "params": [p for p in parameters if not config.decay_all and p.ndim < 2],
            "weight_decay": 0.0,
        },
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
    )


def lr_factor(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """Return step -> factor of the peak rate: step/warmup, then constant or a cosine to 0."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return step / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor

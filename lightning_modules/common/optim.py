"""AdamW and the schedules of its rate, as most of the papers use them."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW

from lightning_modules.common.config import AdversarialOptimConfig, OptimConfig

FUSED = {"cpu", "cuda"}  # where all parameters are updated by one kernel


def adamw(
    config: OptimConfig | AdversarialOptimConfig,
    modules: Iterable[nn.Module],
    lr: float | None = None,
    precision: str = "32-true",
) -> AdamW:
    """Make AdamW over all trainable parameters of `modules`.

    Args:
        config: its settings.
        modules: what is trained.
        lr: its rate; None is the config's.
        precision: the trainer's. The update is one fused kernel, but for 16-mixed, where that
            would unscale the gradients by itself, after they were clipped.
    """
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    decayed = [p for p in parameters if config.decay_all or p.ndim >= 2]
    others = [p for p in parameters if not config.decay_all and p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    b1, b2 = config.betas
    return AdamW(
        [g for g in groups if g["params"]],
        lr=lr or config.lr,
        betas=(b1, b2),
        weight_decay=config.weight_decay,
        fused=precision != "16-mixed" and {p.device.type for p in parameters} <= FUSED,
    )


def cosine(start: float, end: float, done: int, total: int) -> float:
    """Return the value after `done` of `total` steps of a half cosine from start to end."""
    progress = min(1.0, done / total) if total > 0 else 1.0
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def lr_factor(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """Return step -> factor of the peak rate: step/warmup, then constant or a cosine to 0."""
    warmup = config.warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        if config.schedule == "constant":
            return 1.0
        return cosine(1.0, 0.0, step - warmup, max(1, total_steps - warmup))

    return factor

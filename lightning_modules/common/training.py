"""What all Lightning modules of the suite do alike in training."""

from collections.abc import Mapping, Sized
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from lightning_modules.common.seeding import mix_seed


class SeededModule(LightningModule):
    """Draws the random numbers of an epoch from (seed, epoch, rank).

    Args:
        config: plain containers, kept as the hyperparameters; `seed` (0) is one of them.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters({"config": config})
        self.seed: int = config.get("seed", 0)
        self.generator = torch.Generator()

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Seed all noise of an epoch: resuming at its border is exact.

        This waits for the first batch because a data loader's iterator, which is made before or
        after the epoch's start depending on resuming, may draw from the global generator.
        """
        if batch_idx == 0:
            seed = mix_seed(self.seed, self.current_epoch, self.global_rank)
            torch.manual_seed(seed)
            self.generator = torch.Generator(self.device).manual_seed(seed)

    def log_scalars(self, stage: str, scalars: Mapping[str, Tensor], batch: Sized) -> None:
        """Log scalars under `train/` or `val/`; those of validation are means over the ranks."""
        values = {f"{stage}/{name}": value.detach() for name, value in scalars.items()}
        self.log_dict(values, batch_size=len(batch), sync_dist=stage == "val")

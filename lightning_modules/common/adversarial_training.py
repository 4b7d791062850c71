"""Training of an autoencoder, against a discriminator where it has one: everything but its loss."""

import math
from abc import abstractmethod
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_modules.common.adversarial import NLayerDiscriminator
from lightning_modules.common.config import AdversarialConfig, AdversarialOptimConfig
from lightning_modules.common.perceptual import LPIPS, load_lpips
from lightning_modules.common.seeding import mix_seed


class AdversarialModule(L.LightningModule):
    """An autoencoder and its discriminator under manual optimization.

    Two departures from the released training loop of VQGAN: a batch passes the autoencoder once
    (generator step first, then the discriminator on the same, detached reconstructions), and the
    discriminator is not run before disc_start. Both optimizers and all schedules count
    batches (`batches_seen`), not optimizer steps, of which Lightning sees two per batch.

    Args:
        config: plain containers, kept as the hyperparameters; `seed` (0) is what every epoch's
            random numbers follow from, together with epoch and rank.
        optim: optimizers of autoencoder and discriminator.
    """

    def __init__(self, config: dict[str, Any], optim: AdversarialOptimConfig) -> None:
        super().__init__()
        self.save_hyperparameters({"config": config})
        self.seed = int(config.get("seed", 0))
        self.optim = optim
        self.automatic_optimization = False
        self.batches_seen = 0
        self.discriminator: NLayerDiscriminator | None = None
        # in a list, so that neither checkpoints nor optimizers nor DDP see the frozen network
        self._lpips: list[LPIPS] = []

    @abstractmethod
    def trained_network(self) -> nn.Module:
        """Return the autoencoder, whose parameters the first optimizer steps."""

    def add_discriminator(self, adversarial: AdversarialConfig, in_channels: int = 3) -> None:
        """Build the discriminator, unless its weight is 0."""
        if adversarial.adversarial:
            self.discriminator = NLayerDiscriminator(
                in_channels,
                adversarial.disc_width,
                adversarial.disc_layers,
                adversarial.use_actnorm,
            )

    def use_lpips(self, path: str | None, weight: float, stage: str) -> None:
        """Load LPIPS for training or validation, or say once that it is off.

        Args:
            path: file or folder of its weights; None turns it off.
            weight: of the perceptual term; nothing is loaded or said at 0.
            stage: Lightning's name of what is about to happen.
        """
        if self._lpips or weight == 0 or stage not in ("fit", "validate"):
            return
        if path is None:
            rank_zero_info("the perceptual term is off, because objective.lpips_path names no file")
            return
        self._lpips = [load_lpips(path)]

    def perceptual(self) -> LPIPS | None:
        """Return LPIPS on this module's device, or None where it is off."""
        if not self._lpips:
            return None
        self._lpips[0] = self._lpips[0].to(self.device)
        return self._lpips[0]

    def configure_optimizers(self) -> list[Optimizer]:
        """Make one AdamW for the autoencoder and, where there is one, one for its discriminator."""
        optimizers: list[Optimizer] = [self._adamw(self.trained_network(), self.optim.lr)]
        if self.discriminator is not None:
            disc_lr = self.optim.disc_lr or self.optim.lr
            optimizers.append(self._adamw(self.discriminator, disc_lr))
        return optimizers

    def _adamw(self, network: nn.Module, lr: float) -> AdamW:
        optim = self.optim
        parameters = [p for p in network.parameters() if p.requires_grad]
        decayed = [p for p in parameters if optim.decay_all or p.ndim >= 2]
        groups: list[dict[str, Any]] = [{"params": decayed}]
        if len(decayed) < len(parameters):
            others = [p for p in parameters if p.ndim < 2]
            groups.append({"params": others, "weight_decay": 0.0})
        b1, b2 = optim.betas
        return AdamW(groups, lr=lr, betas=(b1, b2), weight_decay=optim.weight_decay)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Make the random numbers of an epoch a function of (seed, epoch, rank).

        A run resumed at an epoch border then draws what an uninterrupted one draws. This waits for
        the first batch because a data loader's iterator, made before or after
        on_train_epoch_start depending on resuming, takes a number from the same generator.
        """
        if batch_idx == 0:
            torch.manual_seed(mix_seed(self.seed, self.current_epoch, self.global_rank))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the batch counter."""
        checkpoint["batches_seen"] = self.batches_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the batch counter."""
        self.batches_seen = checkpoint["batches_seen"]

    def optimizer_list(self) -> list[LightningOptimizer]:
        """Return the autoencoder's optimizer, then the discriminator's if there is one."""
        found = self.optimizers()
        found = found if isinstance(found, list) else [found]
        return [o for o in found if isinstance(o, LightningOptimizer)]

    def set_rates(self, optimizers: list[LightningOptimizer]) -> None:
        """Set the learning rates of this batch."""
        optim = self.optim
        scale = 1.0
        if self.batches_seen < optim.warmup_batches:
            scale = (self.batches_seen + 1) / optim.warmup_batches
        elif optim.decay_batches:
            done = self.batches_seen - optim.warmup_batches
            scale = cosine(1.0, optim.lr_end, done, optim.decay_batches - optim.warmup_batches)
        rates = (optim.lr, optim.disc_lr or optim.lr)
        for optimizer, lr in zip(optimizers, rates, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale

    def step(self, optimizer: LightningOptimizer, loss: Tensor) -> None:
        """Make one update."""
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.optim.clip:
            self.clip_gradients(optimizer, self.optim.clip, "norm")  # type: ignore[arg-type]
        optimizer.step()

    def freeze_discriminator(self, frozen: bool) -> None:
        """Keep the generator's backward pass from computing the discriminator's gradients."""
        if self.discriminator is not None:
            self.discriminator.requires_grad_(not frozen)

    def discriminate(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to the discriminator's logits [B, 1, h, w]."""
        assert self.discriminator is not None
        return self.discriminator(images)


def cosine(start: float, end: float, done: int, total: int) -> float:
    """Return the value after `done` of `total` batches of a half cosine from start to end."""
    progress = min(1.0, done / total) if total > 0 else 1.0
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def image_psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the mean PSNR of pictures [B, 3, H, W] in [-1, 1]; reconstructions are clamped."""
    error = (reconstructions.float().clamp(-1, 1) - images.float()).square().mean((1, 2, 3))
    return (10 * (4 / error.clamp_min(1e-12)).log10()).mean()  # range 2, hence 4 / mse

"""Training of an autoencoder, against a discriminator where it has one: everything but its loss."""

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.common.adversarial import (
    DISC_LOSSES,
    NLayerDiscriminator,
    disc_factor,
    generator_loss,
)
from lightning_modules.common.config import AdversarialConfig, AdversarialOptimConfig
from lightning_modules.common.optim import adamw, cosine
from lightning_modules.common.perceptual import LPIPS, load_lpips
from lightning_modules.common.training import SeededModule


class AdversarialModule(SeededModule):
    """An autoencoder and its discriminator under manual optimization.

    Two departures from the released training loop of VQGAN: a batch passes the autoencoder once
    (generator step first, then the discriminator on the same, detached reconstructions), and the
    discriminator is not run before disc_start. Both optimizers and all schedules count
    batches (`batches_seen`), not optimizer steps, of which Lightning sees two per batch.

    Args:
        config: plain containers, kept as the hyperparameters.
        optim: optimizers of autoencoder and discriminator.
        adversarial: the discriminator and its losses.
    """

    factor: int

    def __init__(
        self,
        config: dict[str, Any],
        optim: AdversarialOptimConfig,
        adversarial: AdversarialConfig,
    ) -> None:
        super().__init__(config)
        self.optim, self.adversarial = optim, adversarial
        self.automatic_optimization = False
        self.batches_seen = 0
        self.discriminator: NLayerDiscriminator | None = None
        # in a list, so that neither checkpoints nor optimizers nor DDP see the frozen network
        self._lpips: list[LPIPS] = []

    @abstractmethod
    def trained_network(self) -> Any:
        """Return the autoencoder, whose parameters the first optimizer steps."""

    def add_discriminator(self, in_channels: int) -> None:
        """Build the discriminator of images of `in_channels`, unless its weight is 0."""
        c = self.adversarial
        if c.adversarial:
            self.discriminator = NLayerDiscriminator(
                in_channels, c.disc_width, c.disc_layers, c.use_actnorm
            )

    def check_size(self, images: Tensor) -> None:
        """Refuse images [B, 3, H, W] whose sides `factor` does not divide."""
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"the first stage needs sides that are multiples of {self.factor}, "
                f"got {height} x {width}"
            )

    def use_lpips(self, path: str | None, weight: float, stage: str) -> None:
        """Load LPIPS for the stages that have a loss, or say once that it is off (no path)."""
        if self._lpips or weight == 0 or stage not in ("fit", "validate"):
            return
        if path is None:
            rank_zero_info("the perceptual term is off, because objective.lpips_path names no file")
        else:
            self._lpips = [load_lpips(path)]

    def perceptual(self) -> LPIPS | None:
        """Return LPIPS on this module's device, or None where it is off."""
        return self._lpips[0].to(self.device) if self._lpips else None

    def configure_optimizers(self) -> list[Optimizer]:
        """Make one AdamW for the autoencoder and, where there is one, one for its discriminator."""
        optimizers: list[Optimizer] = [adamw(self.optim, [self.trained_network()])]
        if self.discriminator is not None:
            optimizers.append(adamw(self.optim, [self.discriminator], self.optim.disc_lr))
        return optimizers

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the batch counter."""
        checkpoint["batches_seen"] = self.batches_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the batch counter."""
        self.batches_seen = checkpoint["batches_seen"]

    def optimizer_list(self) -> list[LightningOptimizer]:
        """Return the autoencoder's optimizer, then the discriminator's if there is one."""
        found = self.optimizers()
        return found if isinstance(found, list) else [found]

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

    def update(self, images: Tensor, made: Tensor, nll: Tensor, loss: Tensor) -> dict[str, Tensor]:
        """Step the autoencoder, then the discriminator once disc_start batches were seen.

        Args:
            images: [B, 3, H, W].
            made: their reconstructions, with graph.
            nll: the reconstruction loss, which the adaptive weight compares.
            loss: all but the adversarial term.

        Returns:
            Scalars to log.
        """
        optimizers = self.optimizer_list()
        self.set_rates(optimizers)
        network, factor = self.discriminator, 0.0
        logs: dict[str, Tensor] = {}
        if network is not None:
            factor = disc_factor(self.adversarial, self.batches_seen)
            network.requires_grad_(False)  # its gradients are not the generator's business
        if network is not None and factor:
            last_layer = self.trained_network().last_layer
            loss, logs = generator_loss(
                loss, nll, network(made), last_layer, self.adversarial, factor
            )
        self.step(optimizers[0], loss)
        if network is not None:
            network.requires_grad_(True)
        if network is not None and factor:
            real, fake = network(images), network(made.detach())
            disc_loss = DISC_LOSSES[self.adversarial.disc_loss](real.float(), fake.float())
            self.step(optimizers[1], factor * disc_loss)
            logs["disc_loss"] = factor * disc_loss
            logs |= {"logits_real": real.mean(), "logits_fake": fake.mean()}
        self.batches_seen += 1
        rate, seen = optimizers[0].param_groups[0]["lr"], float(self.batches_seen)
        return logs | {"loss": loss, "lr": torch.tensor(rate), "batch": torch.tensor(seen)}


def image_psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the mean PSNR of pictures [B, 3, H, W] in [-1, 1]; reconstructions are clamped."""
    error = (reconstructions.float().clamp(-1, 1) - images.float()).square().mean((1, 2, 3))
    return (10 * (4 / error.clamp_min(1e-12)).log10()).mean()  # range 2, hence 4 / mse

"""VQGAN as a LightningModule: the tokenizer that generators meet, and its training."""

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_modules.common.checkpoint import load_strict
from lightning_modules.common.seeding import mix_seed
from lightning_modules.common.settings import build, plain
from lightning_modules.vqgan import convert
from lightning_modules.vqgan.config import VQGANConfig
from lightning_modules.vqgan.losses import (
    DISC_LOSSES,
    LPIPS,
    NLayerDiscriminator,
    disc_factor,
    generator_loss,
    reconstruction_loss,
)
from lightning_modules.vqgan.network import NETWORKS
from lightning_modules.vqgan.quantizer import Quantized, code_counts, perplexity, usage


class VQGANModule(L.LightningModule):
    """The tokenizer: images [-1, 1] to codes and back, and the GAN training that makes it.

    Two departures from the released training loop: a batch passes the autoencoder once (generator
    step first, then the discriminator on the same, detached reconstructions), and the
    discriminator is not run before disc_start. Both players and all schedules count batches
    (`batches_seen`), not optimizer steps, of which Lightning sees two per batch.

    Args:
        config: plain dict with the sections of `VQGANConfig`, and optionally `seed` (0), from
            which every epoch's random numbers follow together with epoch and rank.

    Raises:
        ValueError: an unknown setting, or one out of range.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters({"config": config})
        self.seed = int(config.get("seed", 0))
        self.config = build(
            VQGANConfig, {k: v for k, v in config.items() if k not in ("seed", "paper")}
        )
        model, objective = self.config.model, self.config.objective
        self.autoencoder = NETWORKS[model.network](model)
        self.discriminator = (
            NLayerDiscriminator(
                model.in_channels,
                objective.disc_width,
                objective.disc_layers,
                objective.use_actnorm,
            )
            if objective.adversarial
            else None
        )
        self.automatic_optimization = False
        self.batches_seen = 0
        self.factor: int = model.factor
        # in a list, so that neither checkpoints nor optimizers nor DDP see the frozen network
        self._lpips: list[LPIPS] = []
        self._val_counts = torch.zeros(model.num_codes, dtype=torch.int64)

    @property
    def num_codes(self) -> int:
        """Number of token ids that `encode` can return."""
        return self.autoencoder.quantize.num_tokens

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Map images to tokens.

        Args:
            images: [B, 3, H, W] in [-1, 1]; H and W multiples of `factor`.
            generator: for Gumbel models with sample_tokens and for unknown_code=random.

        Returns:
            [B, H/factor, W/factor] int64 in [0, num_codes).

        Raises:
            ValueError: a height or width that `factor` does not divide.
        """
        self._check_size(images)
        quantize = self.autoencoder.quantize
        return quantize.to_used(
            quantize.assign(self.autoencoder.encode(images), generator), generator
        )

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, h, w] int64 to images [B, 3, h*factor, w*factor], clamped to [-1, 1]."""
        quantize = self.autoencoder.quantize
        return self.decode_codes(quantize.lookup(quantize.to_all(tokens))).clamp(-1, 1)

    def codebook(self) -> Tensor:
        """Return the vector of each token id [num_codes, c]."""
        quantize = self.autoencoder.quantize
        ids = torch.arange(self.num_codes, device=self.device)
        return quantize.codebook()[quantize.to_all(ids)].detach()

    def latents(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] in [-1, 1] to latents [B, c, h, w] divided by scale_factor."""
        self._check_size(images)
        return self.autoencoder.encode(images) / self.config.model.scale_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Map latents [B, c, h, w], divided by scale_factor, to images, not clamped."""
        return self.decode_codes(latents * self.config.model.scale_factor)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Map code vectors [B, c, h, w] to images [B, 3, H, W], not clamped."""
        return self.autoencoder.decode(codes.to(self.autoencoder.last_layer.dtype))

    def forward(
        self,
        images: Tensor,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Quantized, Tensor]:
        """Encode, quantize and decode.

        Args:
            images: [B, 3, H, W] in [-1, 1].
            noise: Gumbel noise [B, K, h, w] of a Gumbel quantizer; drawn where missing.
            generator: for that draw.

        Returns:
            Reconstructions [B, 3, H, W] (not clamped), the quantizer's output, latents.
        """
        z = self.autoencoder.encode(images)
        quantized = self.autoencoder.quantize(z, noise, generator)
        return self.decode_codes(quantized.codes), quantized, z

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a tokenizer file holds: the autoencoder with its quantizer, and settings."""
        state = {k: v.detach() for k, v in self.autoencoder.state_dict().items()}
        return state, {"paper": "vqgan", "model": plain(self.config.model)}

    @classmethod
    def from_export(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> "VQGANModule":
        """Build the tokenizer, without discriminator, from `export` or a Lightning checkpoint.

        Args:
            state: tensors of `export`, or a whole `state_dict` of this module.
            config: settings with the section `model`.

        Raises:
            ValueError: tensors that do not fit the settings.
        """
        prefix = "autoencoder."
        if any(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        module = cls(
            {
                "model": dict(config["model"]),
                "objective": {"disc_weight": 0.0, "perceptual_weight": 0.0},
            }
        )
        load_strict(module.autoencoder, state, "the tokenizer file")
        return module.eval()

    def setup(self, stage: str) -> None:
        """Load LPIPS for training or validation, or say once that it is off."""
        objective = self.config.objective
        if self._lpips or objective.perceptual_weight == 0 or stage not in ("fit", "validate"):
            return
        if objective.lpips_path is None:
            rank_zero_info(
                "vqgan: the perceptual term is off, because objective.lpips_path names no file"
            )
            return
        state, widths = convert.load_lpips(objective.lpips_path)
        lpips = LPIPS(widths)
        load_strict(lpips, state, objective.lpips_path)
        self._lpips = [lpips]

    def configure_optimizers(self) -> list[Optimizer]:
        """Make one Adam for the autoencoder and, where there is one, one for the discriminator."""
        optim = self.config.optim
        players: list[tuple[nn.Module, float]] = [(self.autoencoder, optim.lr)]
        if self.discriminator is not None:
            players.append((self.discriminator, optim.disc_lr or optim.lr))
        b1, b2 = optim.betas
        return [
            AdamW(
                [p for p in player.parameters() if p.requires_grad],
                lr=lr,
                betas=(b1, b2),
                weight_decay=optim.weight_decay,
            )
            for player, lr in players
        ]

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Make the random numbers of an epoch a function of (seed, epoch, rank).

        A run resumed at an epoch border then draws what an uninterrupted one draws. This waits for
        the first batch because a data loader's iterator, made before or after
        on_train_epoch_start depending on resuming, takes a number from the same generator.
        """
        if batch_idx == 0:
            torch.manual_seed(mix_seed(self.seed, self.current_epoch, self.global_rank))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Step the autoencoder, then the discriminator once disc_start batches were seen."""
        images = batch["image"]
        objective, last_layer = self.config.objective, self.autoencoder.last_layer
        players = self._players()
        self._set_schedules(players)
        factor = disc_factor(objective, self.batches_seen)

        self._freeze_discriminator(True)
        reconstructions, quantized, z = self(images)
        nll, logs = reconstruction_loss(images, reconstructions, objective, self._perceptual())
        loss, extra = generator_loss(
            nll,
            quantized.loss,
            objective,
            factor=factor,
            fake_logits=self._judge(reconstructions) if factor else None,
            last_layer=last_layer,
        )
        self._step(players[0], loss)
        self.autoencoder.quantize.update(z, quantized.tokens)
        self._freeze_discriminator(False)

        logs |= extra | {"loss": loss.detach(), "codebook": quantized.loss.detach()}
        if factor:
            real, fake = self._judge(images), self._judge(reconstructions.detach())
            disc_loss = factor * DISC_LOSSES[objective.disc_loss](real.float(), fake.float())
            self._step(players[1], disc_loss)
            logs |= {
                "disc_loss": disc_loss.detach(),
                "logits_real": real.detach().mean(),
                "logits_fake": fake.detach().mean(),
            }
        self.batches_seen += 1

        counts = code_counts(quantized.tokens, self.config.model.num_codes)
        logs |= {"usage": usage(counts), "perplexity": perplexity(counts)}
        logs["lr"] = torch.tensor(players[0].param_groups[0]["lr"])
        logs["batch"] = torch.tensor(float(self.batches_seen))
        for name, value in logs.items():
            shown = name in ("loss", "rec", "usage")
            self.log(f"train/{name}", value, prog_bar=shown, batch_size=len(images))

    def on_validation_epoch_start(self) -> None:
        """Start the code histogram of a validation pass."""
        self._val_counts = torch.zeros(
            self.config.model.num_codes, dtype=torch.int64, device=self.device
        )

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the losses of the reconstruction and PSNR, and count the codes."""
        images = batch["image"]
        reconstructions, quantized, _ = self(images)
        loss, logs = reconstruction_loss(
            images, reconstructions, self.config.objective, self._perceptual()
        )
        error = (reconstructions.float().clamp(-1, 1) - images.float()).square().mean((1, 2, 3))
        logs |= {
            "loss": loss + self.config.objective.codebook_weight * quantized.loss,
            "codebook": quantized.loss,
            # range 2, hence 4 / mse; the mean of per-image values
            "psnr": (10 * (4 / error.clamp_min(1e-12)).log10()).mean(),
        }
        for name, value in logs.items():
            self.log(f"val/{name}", value, sync_dist=True, batch_size=len(images))
        self._val_counts += code_counts(quantized.tokens, self.config.model.num_codes)

    def on_validation_epoch_end(self) -> None:
        """Log codebook usage and perplexity over the whole validation set."""
        counts = self.trainer.strategy.reduce(self._val_counts, reduce_op="sum")
        assert isinstance(counts, Tensor)
        self.log("val/usage", usage(counts), sync_dist=True)
        self.log("val/perplexity", perplexity(counts), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the batch counter."""
        checkpoint["batches_seen"] = self.batches_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the batch counter."""
        self.batches_seen = checkpoint["batches_seen"]

    def _players(self) -> list[LightningOptimizer]:
        optimizers = self.optimizers()
        players = optimizers if isinstance(optimizers, list) else [optimizers]
        return [p for p in players if isinstance(p, LightningOptimizer)]

    def _set_schedules(self, players: list[LightningOptimizer]) -> None:
        """Set learning rates and the Gumbel temperature of this batch."""
        optim, model = self.config.optim, self.config.model
        share = 1.0
        if self.batches_seen < optim.warmup_batches:
            share = (self.batches_seen + 1) / optim.warmup_batches
        elif optim.decay_batches:
            done = self.batches_seen - optim.warmup_batches
            share = _cosine(1.0, optim.lr_end, done, optim.decay_batches - optim.warmup_batches)
        rates = (optim.lr, optim.disc_lr or optim.lr)
        for player, lr in zip(players, rates, strict=False):
            for group in player.param_groups:
                group["lr"] = lr * share
        if model.temperature_batches:
            self.autoencoder.quantize.temperature = _cosine(
                model.temperature,
                model.temperature_end,
                self.batches_seen,
                model.temperature_batches,
            )

    def _step(self, player: LightningOptimizer, loss: Tensor) -> None:
        player.zero_grad()
        self.manual_backward(loss)
        if self.config.optim.clip:
            self.clip_gradients(player, self.config.optim.clip, "norm")  # type: ignore[arg-type]
        player.step()

    def _freeze_discriminator(self, frozen: bool) -> None:
        """Keep the generator's backward pass from computing the discriminator's gradients."""
        if self.discriminator is not None:
            self.discriminator.requires_grad_(not frozen)

    def _judge(self, images: Tensor) -> Tensor:
        assert isinstance(self.discriminator, nn.Module)
        return self.discriminator(images)

    def _perceptual(self) -> LPIPS | None:
        """Return LPIPS on this module's device, or None where it is off."""
        if not self._lpips:
            return None
        self._lpips[0] = self._lpips[0].to(self.device)
        return self._lpips[0]

    def _check_size(self, images: Tensor) -> None:
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"the tokenizer needs sides that are multiples of {self.factor}, "
                f"got {height} x {width}"
            )


def _cosine(start: float, end: float, done: int, total: int) -> float:
    """Return the value after `done` of `total` batches of a half cosine from start to end."""
    share = min(1.0, done / total) if total > 0 else 1.0
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

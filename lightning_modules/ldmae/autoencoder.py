"""The autoencoders of LDMAE as a LightningModule: images to normalised latents and back."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.common.adversarial_training import AdversarialModule, image_psnr
from lightning_modules.common.checkpoint import load_strict, load_weights
from lightning_modules.common.settings import build, plain
from lightning_modules.ldmae.config import AutoencoderConfig
from lightning_modules.ldmae.conv import ConvAutoencoder
from lightning_modules.ldmae.losses import (
    LOGVAR_RANGE,
    channel_statistics,
    draw_latents,
    normal_kl,
    patch_errors,
    split_moments,
    variance_kl,
    visible_and_masked,
)
from lightning_modules.ldmae.vmae import VMAE, Masking, masking, resize_tables, visible_patches

EXPORTED = ("network.", "latent_")  # what a file holds
LEAST_STD = 1e-6  # of a channel; a draw of log variance -30 alone has 3e-7


@dataclass
class TrainingNoise:
    """The random numbers of one training batch; None where a kind or a setting needs none."""

    mask: Tensor | None = None
    """[B, L] uniform, orders the patches for masking."""
    posterior: Tensor | None = None
    """Standard normal, [B, C, N] for N visible patches, or [B, C, h, w] (conv)."""
    image: Tensor | None = None
    """[B, 3, H, W] standard normal, the noise of dae before it is scaled."""


@dataclass
class Pass:
    """What became of a training batch."""

    images: Tensor
    """Reconstructions [B, 3, H, W], not clamped."""
    mean: Tensor
    """[B, C, N] or [B, C, h, w]."""
    logvar: Tensor | None
    """The same shape; None where the kind has no variance."""
    hidden: Masking | None
    """Which patches the encoder did not see."""


class AutoencoderModule(AdversarialModule):
    """The continuous twin of the tokenizer: VMAE, or one of the four that it is compared with.

    Args:
        config: plain dict with the fields of `AutoencoderConfig`, and optionally `seed` (0).

    Raises:
        ValueError: an unknown setting, or one out of range.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        own = {k: v for k, v in config.items() if k not in ("seed", "paper")}
        c = build(AutoencoderConfig, own)
        super().__init__(config, c.optim, c.objective)
        self.config = c
        self.network: VMAE | ConvAutoencoder = (
            VMAE(c.vit, c.channels)
            if c.kind == "vmae"
            else ConvAutoencoder(c.conv, c.channels, c.stochastic)
        )
        if c.kind == "sdvae":
            self.add_discriminator(c.conv.in_channels)
        self.channels: int = c.channels
        self.factor: int = c.factor
        self.register_buffer("latent_mean", torch.zeros(c.channels))
        self.register_buffer("latent_std", torch.ones(c.channels))
        if c.objective.freeze_encoder:
            self.network.encoder.requires_grad_(False)

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [-1, 1] to posteriors [B, 2C, H/factor, W/factor].

        These are C means, then C log variances in [-30, 20]; -30 where the kind has none (ae, dae).
        """
        self.check_size(images)
        moments = self.network.moments(images.to(self.latent_mean.dtype))
        if not self.config.stochastic:
            return torch.cat([moments, torch.full_like(moments, LOGVAR_RANGE[0])], dim=1)
        return torch.cat(split_moments(moments), dim=1)

    def sample_posterior(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Draw latents [B, C, h, w], not normalised: moments [B, 2C, h, w], noise N(0, 1)."""
        return draw_latents(*split_moments(moments), noise)

    def normalise(self, latents: Tensor) -> Tensor:
        """Bring latents [B, C, h, w] to mean 0 and standard deviation 1 in every channel."""
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undo `normalise`."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def encode(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] in [-1, 1] to the normalised posterior means [B, C, h, w]."""
        return self.normalise(split_moments(self.moments(images))[0])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Map normalised latents [B, C, h, w] to images [B, 3, H, W], clamped to [-1, 1]."""
        return self.decode_raw(self.denormalise(latents)).clamp(-1, 1)

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Map latents [B, C, h, w] that are not normalised to images that are not clamped."""
        return self.network.decode(latents.to(self.latent_mean.dtype))

    def measure(self, images: Iterable[Tensor], count: int, generator: torch.Generator) -> None:
        """Set the statistics of `normalise` from the sampled latents of `count` training images.

        Every picture has its own draw and is summed by itself in float64, so that the size of the
        batches changes nothing but the rounding of the encoder. The released code takes 10,000
        pictures, not flipped.

        Args:
            images: batches [B, 3, H, W] in [-1, 1] of any size; what is over is not looked at.
            count: pictures; ValueError where there are fewer, or a channel never changes.
            generator: source of the posterior noise, on the CPU.
        """

        def draws() -> Iterator[Tensor]:
            left = count
            for batch in images:
                moments = self.moments(batch[:left].to(self.device)).cpu().double()
                for picture in moments.split(1):  # [1, 2C, h, w]
                    noise = torch.randn(picture[:, : self.channels].shape, generator=generator)
                    yield self.sample_posterior(picture, noise.double())
                left -= len(moments)
                if left == 0:
                    return
            if left:
                raise ValueError(f"statistics of {count} pictures need {left} more than there are")

        training = self.training
        self.eval()
        self.set_statistics(*channel_statistics(draws()))
        self.train(training)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Take mean and standard deviation of each channel, [C] each (or [1, C, 1, 1])."""
        if not bool((std > LEAST_STD).all()):
            dead = int((std.flatten() <= LEAST_STD).nonzero()[0])
            raise ValueError(
                f"channel {dead} of the latents never changes: the autoencoder was not trained "
                "well, or on too few images"
            )
        self.latent_mean.copy_(mean.flatten())
        self.latent_std.copy_(std.flatten())

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what an autoencoder file holds: network, statistics, and the settings of both."""
        state = {k: v.detach() for k, v in _exported(self.state_dict()).items()}
        c = self.config
        sizes = {"vit": plain(c.vit)} if c.kind == "vmae" else {"conv": plain(c.conv)}
        return state, {"paper": "autoencoder", "kind": c.kind, "channels": c.channels, **sizes}

    @classmethod
    def from_export(
        cls, state: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> "AutoencoderModule":
        """Build the autoencoder, without its training, from `export` or a Lightning checkpoint."""
        names = ("kind", "channels", "vit", "conv")
        own = {name: config[name] for name in names if name in config}
        module = cls({**own, "objective": {"disc_weight": 0.0}})
        load_strict(module, _exported(state), "the autoencoder")
        return module.eval()

    def trained_network(self) -> nn.Module:
        """Return encoder and decoder."""
        return self.network

    def setup(self, stage: str) -> None:
        """Take the weights that training starts with, and LPIPS where the loss has it."""
        c = self.config
        if stage == "fit" and c.start is not None:
            self.start_from(c.start)
        weight = c.objective.perceptual_weight if c.kind in ("vmae", "sdvae") else 0.0
        self.use_lpips(c.objective.lpips_path, weight, stage)

    def start_from(self, path: Path | str) -> None:
        """Take network and statistics of an autoencoder file; position tables are resized."""
        state, config = load_weights(path)
        if config.get("paper") != "autoencoder" or config["kind"] != self.config.kind:
            what = config.get("kind", config.get("paper"))
            raise ValueError(f"start: {path} holds weights of {what}, not of {self.config.kind}")
        taken = resize_tables(_exported(state), self.config.vit)
        # the discriminator is in no file
        rest = {k: v for k, v in self.state_dict().items() if not k.startswith(EXPORTED)}
        load_strict(self, rest | taken, str(path))

    def draw(self, images: Tensor, generator: torch.Generator) -> TrainingNoise:
        """Draw what a batch [B, 3, H, W] needs from a generator on its device."""
        o, b = self.config.objective, len(images)
        h, w = images.shape[2] // self.factor, images.shape[3] // self.factor
        rng: dict[str, Any] = {"generator": generator, "device": images.device}
        vmae = isinstance(self.network, VMAE)
        noise, positions = TrainingNoise(), [h * w] if vmae else [h, w]
        tuning = vmae and o.tuning_start is not None and self.batches_seen >= o.tuning_start
        if vmae and o.mask_ratio > 0 and not tuning:
            positions = [visible_patches(h * w, o.mask_ratio)]
            noise.mask = torch.rand(b, h * w, **rng)
        if self.config.stochastic and o.sample and not tuning:
            noise.posterior = torch.randn(b, self.channels, *positions, **rng)
        if self.config.kind == "dae":
            noise.image = torch.randn(images.shape, **rng)
        return noise

    def forward(self, images: Tensor, noise: TrainingNoise) -> Pass:
        """Encode and decode images [B, 3, H, W] as in training, with noise of `draw`."""
        o, hidden, logvar = self.config.objective, None, None
        if isinstance(self.network, VMAE):
            if noise.mask is not None:
                hidden = masking(noise.mask, o.mask_ratio)
            moments = self.network.encode_tokens(images, hidden).transpose(1, 2)  # [B, 2C, N]
        else:
            noisy = images if noise.image is None else images + o.noise * noise.image
            moments = self.network.moments(noisy)
        mean = z = moments
        if self.config.stochastic:
            mean, logvar = split_moments(moments.float())
            z = mean if noise.posterior is None else draw_latents(mean, logvar, noise.posterior)
        if isinstance(self.network, VMAE):
            grid = self.network.grid(images)
            made = self.network.decode_tokens(z.transpose(1, 2), grid, hidden)
        else:
            made = self.network.decode(z)
        return Pass(made.float(), mean, logvar, hidden)

    def loss(self, images: Tensor, made: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        """L_R + lambda_M L_M + lambda_P L_P + lambda_reg L_reg, without the adversarial term.

        L_reg is the mean over latent positions of the sum over channels; it leaves the mean free
        for vmae, and is the usual KL from N(0, 1) for vae and sdvae. A term of weight 0 is not
        computed. Beside the scalar stand its terms: visible, masked, perceptual, kl.
        """
        c, o, x = self.config, self.config.objective, images.float()
        terms: dict[str, Tensor] = {}
        if c.kind == "vmae":
            errors = patch_errors(made.images, x, self.factor, o.pixel_loss, o.norm_pix_loss)
            mask = None if made.hidden is None else made.hidden.mask
            terms["visible"], terms["masked"] = visible_and_masked(errors, mask)
        else:
            distance = F.mse_loss if o.pixel_loss == "l2" else F.l1_loss
            terms["visible"] = distance(made.images, x)
        lpips = self.perceptual()
        if lpips is not None and o.perceptual_weight and c.kind in ("vmae", "sdvae"):
            terms["perceptual"] = lpips(x, made.images).mean()
        if made.logvar is not None and c.kl_weight:
            kl = normal_kl(made.mean, made.logvar)
            if c.kind == "vmae":
                kl = variance_kl(made.logvar, o.fixed_std)
            terms["kl"] = kl.sum(1).mean()
        weights = {
            "visible": o.visible_weight,
            "masked": o.masked_weight,
            "perceptual": o.perceptual_weight,
            "kl": c.kl_weight,
        }
        total = sum((weights[k] * v for k, v in terms.items() if weights[k]), x.new_zeros(()))
        return total, terms

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Step the autoencoder, then the discriminator once disc_start batches were seen."""
        images = batch["image"]
        made = self(images, self.draw(images, self.generator))
        loss, logs = self.loss(images, made)
        self.log_scalars("train", logs | self.update(images, made.images, loss, loss), images)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the loss under noise that is the same each time, and PSNR of whole images."""
        images = batch["image"]
        noise = self.draw(images, torch.Generator(images.device).manual_seed(batch_idx))
        loss, logs = self.loss(images, self(images, noise))
        whole = self.network.decode(split_moments(self.moments(images))[0])
        logs |= {"loss": loss, "psnr": image_psnr(images, whole)}
        self.log_scalars("val", logs, images)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (s.view(1, -1, 1, 1) for s in (self.latent_mean, self.latent_std))
        return mean.to(like), std.to(like)


def _exported(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what of a state dict belongs in a file."""
    return {k: v for k, v in state.items() if k.startswith(EXPORTED)}

"""The autoencoders of LDMAE as a LightningModule: images to normalised latents and back."""

from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_modules.common.checkpoint import load_strict
from lightning_modules.common.settings import build, plain
from lightning_modules.ldmae.config import AutoencoderConfig
from lightning_modules.ldmae.conv import ConvAutoencoder
from lightning_modules.ldmae.losses import LOGVAR_RANGE, draw_latents, split_moments
from lightning_modules.ldmae.vmae import VMAE

NETWORK = "network."


class AutoencoderModule(L.LightningModule):
    """The continuous twin of the tokenizer: VMAE, or one of the four that it is compared with.

    Args:
        config: plain dict with the fields of `AutoencoderConfig`, and optionally `seed` (0), from
            which every epoch's random numbers follow together with epoch and rank.

    Raises:
        ValueError: an unknown setting, or one out of range.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters({"config": config})
        self.seed = int(config.get("seed", 0))
        own = {k: v for k, v in config.items() if k not in ("seed", "paper")}
        self.config = build(AutoencoderConfig, own)
        c = self.config
        self.network: VMAE | ConvAutoencoder = (
            VMAE(c.vit, c.channels)
            if c.kind == "vmae"
            else ConvAutoencoder(c.conv, c.channels, c.stochastic)
        )
        self.channels: int = c.channels
        self.factor: int = c.factor
        self.register_buffer("latent_mean", torch.zeros(c.channels))
        self.register_buffer("latent_std", torch.ones(c.channels))

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Encode images to the parameters of their posteriors.

        Args:
            images: [B, 3, H, W] in [-1, 1]; H and W multiples of `factor`.

        Returns:
            [B, 2C, H/factor, W/factor]: C means, then C log variances in [-30, 20]; -30 where the
            kind has no variance (ae, dae).

        Raises:
            ValueError: a height or width that `factor` does not divide.
        """
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"the autoencoder needs sides that are multiples of {self.factor}, "
                f"got {height} x {width}"
            )
        moments = self.network.moments(images.to(self.dtype))
        if not self.config.stochastic:
            return torch.cat([moments, torch.full_like(moments, LOGVAR_RANGE[0])], dim=1)
        return torch.cat(split_moments(moments), dim=1)

    def sample_posterior(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Draw latents, not normalised.

        Args:
            moments: [B, 2C, h, w] as `moments` returns them.
            noise: [B, C, h, w] standard normal; zeros give the mean.

        Returns:
            [B, C, h, w].
        """
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
        return self.network.decode(latents.to(self.dtype))

    @torch.no_grad()
    def measure(self, batches: Iterable[Tensor], generator: torch.Generator) -> None:
        """Set the statistics of `normalise` from sampled latents of training images.

        Args:
            batches: images [B, 3, H, W] in [-1, 1]; the released code takes 10,000, not flipped.
            generator: source of the posterior noise, on the CPU.

        Raises:
            ValueError: no images, or a channel that never changes.
        """
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for images in batches:
            moments = self.moments(images.to(self.device)).cpu()
            noise = torch.randn(moments[:, : self.channels].shape, generator=generator)
            rows = self.sample_posterior(moments, noise).double().transpose(0, 1).flatten(1)
            count += rows.shape[1]
            total, squares = total + rows.sum(1), squares + rows.square().sum(1)
        if count < 2:
            raise ValueError("the latents' statistics need at least one image")
        mean = total / count
        std = ((squares - count * mean.square()) / (count - 1)).clamp_min(0).sqrt()
        if not bool((std > 0).all()):
            dead = int((std <= 0).nonzero()[0])
            raise ValueError(f"channel {dead} of the latents never changes; train the autoencoder")
        self.set_statistics(mean, std)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Take mean and standard deviation of each channel, [C] each (or [1, C, 1, 1])."""
        self.latent_mean.copy_(mean.flatten())
        self.latent_std.copy_(std.flatten())

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what an autoencoder file holds: network, statistics, and the settings of both."""
        state = {k: v.detach() for k, v in self.state_dict().items() if _exported(k)}
        c = self.config
        sizes = {"vit": plain(c.vit)} if c.kind == "vmae" else {"conv": plain(c.conv)}
        return state, {"paper": "autoencoder", "kind": c.kind, "channels": c.channels, **sizes}

    @classmethod
    def from_export(
        cls, state: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> "AutoencoderModule":
        """Build the autoencoder, without what trains it, from `export` or a Lightning checkpoint.

        Args:
            state: tensors of `export`, or a whole `state_dict` of this module.
            config: settings with kind, channels and the section of its network.

        Raises:
            ValueError: tensors that do not fit the settings.
        """
        names = ("kind", "channels", "vit", "conv")
        own = {name: config[name] for name in names if name in config}
        module = cls({**own, "objective": {"disc_weight": 0.0}})
        load_strict(module, {k: v for k, v in state.items() if _exported(k)}, "the autoencoder")
        return module.eval()

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (s.view(1, -1, 1, 1) for s in (self.latent_mean, self.latent_std))
        return mean.to(like), std.to(like)


def _exported(key: str) -> bool:
    return key.startswith((NETWORK, "latent_"))

"""The convolutional autoencoder that VMAE is compared with: SD3's, also without a variance."""

from torch import Tensor, nn

from lightning_modules.common.config import ConvConfig
from lightning_modules.common.convnet import Decoder, Encoder


class ConvAutoencoder(nn.Module):
    """Encoder and decoder of LDM without 1x1 convolutions around the latent (Esser et al. 2024).

    Args:
        config: sizes.
        channels: C of the latent.
        stochastic: whether the encoder gives C log variances besides C means.
    """

    def __init__(self, config: ConvConfig, channels: int, stochastic: bool) -> None:
        super().__init__()
        self.encoder = Encoder(config, 2 * channels if stochastic else channels)
        self.decoder = Decoder(config, channels)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight at which the adaptive weight compares gradients."""
        return self.decoder.conv_out.weight  # type: ignore[return-value]

    def moments(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to means [B, C, h, w], followed by log variances if any."""
        return self.encoder(images)

    def decode(self, z: Tensor) -> Tensor:
        """Map latents [B, C, h, w] to images [B, 3, H, W], not clamped."""
        return self.decoder(z)

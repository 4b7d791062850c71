"""The two autoencoders: the VQGAN of Esser et al. 2021 and the f4 network of Paella.

Attribute names are those of the released state dicts (CompVis/taming-transformers; dome272/Paella,
src/vqgan.py). Images are in [-1, 1] at the border of both.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.common.blocks import Block
from lightning_modules.common.convnet import Decoder, Encoder
from lightning_modules.vqgan.config import ModelConfig
from lightning_modules.vqgan.quantizer import QUANTIZERS


class TamingVQGAN(nn.Module):
    """Encoder, 1x1 convolutions, quantizer and decoder (Esser et al. 2021, table 7)."""

    decoding = ("decoder", "post_quant_conv")  # what turns codes into pictures

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.unit_range = config.unit_range
        self.encoder = Encoder(config, config.z_channels, config.ch_first)
        blocks = config.decoder_res_blocks - 1 if config.decoder_res_blocks else None
        of_decoder = dataclasses.replace(
            config,
            ch=config.decoder_ch or config.ch,
            num_res_blocks=config.num_res_blocks if blocks is None else blocks,
        )
        self.decoder = Decoder(of_decoder, config.z_channels)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.quantize = QUANTIZERS[config.quantizer](config)

    def encode(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] in [-1, 1] to latents [B, c, h, w] before quantizing."""
        return self.quant_conv(self.encoder((images + 1) / 2 if self.unit_range else images))

    def decode(self, codes: Tensor) -> Tensor:
        """Map code vectors [B, c, h, w] to images [B, 3, H, W], not clamped."""
        images = self.decoder(self.post_quant_conv(codes))
        return images * 2 - 1 if self.unit_range else images

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight at which the adaptive weight compares gradients."""
        return self.decoder.conv_out.weight  # type: ignore[return-value]


class PaellaBlock(Block):
    """Depthwise convolution and MLP, each scaled by gammas that start at zero."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.gammas = nn.Parameter(torch.zeros(6))
        self.depthwise = nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(c, c, 3, groups=c))
        self.channelwise = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, c, H, W] to the same shape."""
        g = self.gammas
        x = x + g[2] * self.depthwise(_channel_norm(x) * (1 + g[0]) + g[1])
        h = (_channel_norm(x) * (1 + g[3]) + g[4]).permute(0, 2, 3, 1)
        return x + g[5] * self.channelwise(h).permute(0, 3, 1, 2)


class PaellaVQGAN(nn.Module):
    """The f4 tokenizer of Paella; its own images are in [0, 1], which stays inside."""

    decoding = ("up_blocks", "out_block")  # what turns codes into pictures

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        pixels = 4 * config.in_channels
        widths = [config.c_hidden // 2**i for i in reversed(range(config.levels))]
        self.in_block = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(pixels, widths[0], 1))
        down: list[nn.Module] = []
        for i, c in enumerate(widths):
            if i > 0:
                down.append(nn.Conv2d(widths[i - 1], c, 4, stride=2, padding=1))
            down.append(PaellaBlock(c))
        down.append(
            nn.Sequential(
                nn.Conv2d(widths[-1], config.c_latent, 1, bias=False),
                nn.BatchNorm2d(config.c_latent),
            )
        )
        self.down_blocks = nn.Sequential(*down)

        self.quantize = QUANTIZERS[config.quantizer](config)

        wide = config.decoder_hidden or config.c_hidden
        widths = [wide // 2**i for i in reversed(range(config.levels))]
        up: list[nn.Module] = [nn.Sequential(nn.Conv2d(config.c_latent, widths[-1], 1))]
        for i in reversed(range(config.levels)):
            blocks = config.bottleneck_blocks if i == config.levels - 1 else 1
            up.extend(PaellaBlock(widths[i]) for _ in range(blocks))
            if i > 0:
                up.append(nn.ConvTranspose2d(widths[i], widths[i - 1], 4, stride=2, padding=1))
        self.up_blocks = nn.Sequential(*up)
        self.out_block = nn.Sequential(nn.Conv2d(widths[0], pixels, 1), nn.PixelShuffle(2))

    def encode(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] in [-1, 1] to latents [B, c, h, w] before quantizing."""
        return self.down_blocks(self.in_block((images + 1) / 2))

    def decode(self, codes: Tensor) -> Tensor:
        """Map code vectors [B, c, h, w] to images [B, 3, H, W], not clamped."""
        return self.out_block(self.up_blocks(codes)) * 2 - 1

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight at which the adaptive weight compares gradients."""
        return self.out_block[0].weight  # type: ignore[return-value]


NETWORKS: dict[str, type[TamingVQGAN] | type[PaellaVQGAN]] = {
    "taming": TamingVQGAN,
    "paella": PaellaVQGAN,
}


def _channel_norm(x: Tensor) -> Tensor:
    """LayerNorm over the channels of [B, c, H, W], without parameters."""
    h = x.permute(0, 2, 3, 1)
    return F.layer_norm(h, h.shape[-1:], eps=1e-6).permute(0, 3, 1, 2)

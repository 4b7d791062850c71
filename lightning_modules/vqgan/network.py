"""The two autoencoders: the VQGAN of Esser et al. 2021 and the f4 network of Paella.

Attribute names are those of the released state dicts (CompVis/taming-transformers,
taming/modules/diffusionmodules/model.py; dome272/Paella, src/vqgan.py). Images are in [-1, 1] at
the border of both.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.vqgan.config import ModelConfig
from lightning_modules.vqgan.quantizer import QUANTIZERS


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions behind GroupNorm and swish, added to the input."""

    def __init__(self, c_in: int, c_out: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, c_in, H, W] to [B, c_out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttentionBlock(nn.Module):
    """One head of self-attention over all positions, added to the input."""

    def __init__(self, c: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, c, H, W] to the same shape."""
        h = self.norm(x)
        q, k, v = (  # each [B, 1, H*W, c]
            f(h).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve the map; the padding is on the right and at the bottom only."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, c, H, W] to [B, c, H/2, W/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the map by nearest neighbours and smooth it."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, c, H, W] to [B, c, 2H, 2W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution and the change to the next.

    Args:
        c_in: channels of the input.
        c_out: channels after the first block.
        blocks: number of residual blocks.
        attention: whether each block is followed by attention.
        resize: `Downsample`, `Upsample`, or None on the last level.
        config: groups and dropout.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        blocks: int,
        attention: bool,
        resize: type[Downsample] | type[Upsample] | None,
        config: ModelConfig,
    ) -> None:
        super().__init__()
        groups = config.norm_groups
        self.block = nn.ModuleList(
            ResidualBlock(c_in if j == 0 else c_out, c_out, groups, config.dropout)
            for j in range(blocks)
        )
        self.attn = nn.ModuleList(
            AttentionBlock(c_out, groups) for _ in range(blocks if attention else 0)
        )
        self.downsample = Downsample(c_out) if resize is Downsample else nn.Identity()
        self.upsample = Upsample(c_out) if resize is Upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, c_in, H, W] to [B, c_out, H', W']."""
        for j, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[j](x)
        return self.upsample(self.downsample(x))


class Middle(nn.Module):
    """The bottleneck, with attention whatever attn_resolutions says."""

    def __init__(self, c: int, config: ModelConfig) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(c, c, config.norm_groups, config.dropout)
        self.attn_1 = (
            nn.Identity() if config.attn_type == "none" else AttentionBlock(c, config.norm_groups)
        )
        self.block_2 = ResidualBlock(c, c, config.norm_groups, config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, c, H, W] to the same shape."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images to z_channels maps."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        blocks, last = config.num_res_blocks, len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.Sequential(
            *(
                Level(
                    widths[i - 1] if i > 0 else config.ch,
                    width,
                    blocks,
                    _has_attention(config, i),
                    Downsample if i < last else None,
                    config,
                )
                for i, width in enumerate(widths)
            )
        )
        self.mid = Middle(widths[-1], config)
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to [B, z_channels, H/f, W/f]."""
        h = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """z_channels maps to images; `up.i` is level i, so up.0 runs last."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        blocks, last = config.num_res_blocks + 1, len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config)
        self.up = nn.ModuleList(
            Level(
                widths[min(i + 1, last)],
                width,
                blocks,
                _has_attention(config, i),
                Upsample if i > 0 else None,
                config,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Map [B, z_channels, h, w] to images [B, 3, h*f, w*f]."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class TamingVQGAN(nn.Module):
    """Encoder, 1x1 convolutions, quantizer and decoder (Esser et al. 2021, table 7)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.quantize = QUANTIZERS[config.quantizer](config)

    def encode(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] in [-1, 1] to latents [B, c, h, w] before quantizing."""
        return self.quant_conv(self.encoder(images))

    def decode(self, codes: Tensor) -> Tensor:
        """Map code vectors [B, c, h, w] to images [B, 3, H, W], not clamped."""
        return self.decoder(self.post_quant_conv(codes))

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight at which the adaptive weight compares gradients."""
        return self.decoder.conv_out.weight  # type: ignore[return-value]


class PaellaBlock(nn.Module):
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


def _has_attention(config: ModelConfig, level: int) -> bool:
    size = config.resolution // 2**level
    return config.attn_type != "none" and size in config.attn_resolutions


def _channel_norm(x: Tensor) -> Tensor:
    """LayerNorm over the channels of [B, c, H, W], without parameters."""
    h = x.permute(0, 2, 3, 1)
    return F.layer_norm(h, h.shape[-1:], eps=1e-6).permute(0, 3, 1, 2)

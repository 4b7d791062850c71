"""The convolutional encoder and decoder of VQGAN, LDM and the SD3 autoencoder.

Attribute names are those of the released state dicts (CompVis/taming-transformers,
taming/modules/diffusionmodules/model.py; Esser et al. 2021, table 7).
"""

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.common.attention import attend
from lightning_modules.common.blocks import Block
from lightning_modules.common.config import ConvConfig


class ResidualBlock(Block):
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


class AttentionBlock(Block):
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
        h = attend(q, k, v)
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
    """`blocks` residual blocks, maybe with attention behind each, and the change of size."""

    def __init__(
        self,
        c_in: int,
        level: int,
        blocks: int,
        resize: type[Downsample] | type[Upsample] | None,
        config: ConvConfig,
    ) -> None:
        super().__init__()
        c, groups = config.ch * config.ch_mult[level], config.norm_groups
        attention = config.resolution // 2**level in config.attn_resolutions
        self.block = nn.ModuleList(
            ResidualBlock(c_in if j == 0 else c, c, groups, config.dropout) for j in range(blocks)
        )
        self.attn = nn.ModuleList(
            AttentionBlock(c, groups)
            for _ in self.block
            if attention and config.attn_type != "none"
        )
        self.downsample = Downsample(c) if resize is Downsample else nn.Identity()
        self.upsample = Upsample(c) if resize is Upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, c_in, H, W] to [B, c_out, H', W']."""
        for j, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[j](x)
        return self.upsample(self.downsample(x))


class Middle(nn.Module):
    """The bottleneck, with attention whatever attn_resolutions says."""

    def __init__(self, c: int, config: ConvConfig) -> None:
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
    """Images to maps of c_out channels; c_first behind the first convolution, 0 is config.ch."""

    def __init__(self, config: ConvConfig, c_out: int, c_first: int = 0) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        blocks, last = config.num_res_blocks, len(widths) - 1
        c_first = c_first or config.ch
        self.conv_in = nn.Conv2d(config.in_channels, c_first, 3, padding=1)
        self.down = nn.Sequential()
        for i in range(len(widths)):
            c_in, resize = widths[i - 1] if i > 0 else c_first, Downsample if i < last else None
            self.down.append(Level(c_in, i, blocks, resize, config))
        self.mid = Middle(widths[-1], config)
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to [B, c_out, H/f, W/f]."""
        h = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Maps of c_in channels to images; `up.i` is level i, so up.0 runs last."""

    def __init__(self, config: ConvConfig, c_in: int) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        blocks, last = config.num_res_blocks + 1, len(widths) - 1
        self.conv_in = nn.Conv2d(c_in, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config)
        self.up = nn.ModuleList(
            Level(widths[min(i + 1, last)], i, blocks, Upsample if i > 0 else None, config)
            for i in range(len(widths))
        )
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Map [B, c_in, h, w] to images [B, 3, h*f, w*f]."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))

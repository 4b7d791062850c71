"""VMAE: a masked autoencoder whose bottleneck is a small Gaussian per patch (arXiv 2507.09984).

Attribute names are those of the released state dict (isno0907/ldmae, VMAE/models_mae.py).
Tokens are [B, N, D]; a patch is flattened as (row, column, channel), channel fastest.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.common.attention import attend
from lightning_modules.common.blocks import Block
from lightning_modules.common.checks import require
from lightning_modules.ldmae.config import ViTConfig

EPS = 1e-6


def patchify(images: Tensor, side: int) -> Tensor:
    """Cut images [B, 3, h*side, w*side] into patches [B, h*w, side*side*3], row-major."""
    b, c, height, width = images.shape
    cut = images.reshape(b, c, height // side, side, width // side, side)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, side * side * c)


def unpatchify(patches: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Put patches [B, h*w, side*side*3] together to images [B, 3, h*side, w*side]."""
    h, w = grid
    cut = patches.reshape(len(patches), h, w, side, side, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, h * side, w * side)


def sincos_table(width: int, side: int) -> Tensor:
    """Fixed positions of a square grid (He et al. 2022, MAE): [1, side*side, width].

    The first half of the channels encodes the column, the second the row, each as [sin, cos] of
    the index times 10000^(-k / (width / 4)).
    """
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega  # [side, width / 4]
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, 0)
    return torch.cat([columns, rows], dim=1).float()[None]


def resize_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize positions [1, n*n, D] of a square grid to [1, h*w, D], bilinearly."""
    side = math.isqrt(table.shape[1])
    if grid == (side, side):
        return table
    square = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bilinear", align_corners=False)
    return resized.flatten(2).transpose(1, 2)


def resize_tables(state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Resize the two position tables of a state to config.image_size, as the reference does."""
    side = config.image_size // config.patch_size
    return {
        k: resize_table(v, (side, side)) if k.endswith("pos_embed") else v for k, v in state.items()
    }


@dataclass
class Masking:
    """Which patches the encoder sees."""

    shuffle: Tensor
    """[B, L] int64, positions in the order of their noise; the first `visible` are seen."""
    restore: Tensor
    """[B, L] int64, the inverse order."""
    mask: Tensor
    """[B, L] float, 1 = hidden, in the original order."""
    visible: int
    """How many are seen."""


def visible_patches(patches: int, ratio: float) -> int:
    """Return how many of an image's patches the encoder sees; ValueError: none."""
    visible = int(patches * (1 - ratio))
    require(visible >= 1, f"mask_ratio={ratio} hides all {patches} patches of an image")
    return visible


def masking(noise: Tensor, ratio: float) -> Masking:
    """Hide all but the int(L * (1 - ratio)) patches of least noise, [B, L] uniform."""
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    visible = visible_patches(noise.shape[1], ratio)
    return Masking(shuffle, restore, (restore >= visible).to(noise.dtype), visible)


class Attention(nn.Module):
    """Self-attention over all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, D] to the same shape."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = attend(q, k, v)  # [B, heads, N, d]
        return self.proj(mixed.transpose(1, 2).reshape(b, n, d))


class Perceptron(nn.Module):
    """Two layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, D] to the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class ViTBlock(Block):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Perceptron(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, D] to the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _blocks(depth: int, width: int, heads: int, mlp_ratio: float) -> nn.Sequential:
    return nn.Sequential(*(ViTBlock(width, heads, mlp_ratio) for _ in range(depth)))


class PatchEmbed(nn.Module):
    """Linear embedding of patches."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, side, side)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to tokens [B, N, D]."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Resize(nn.Module):
    """Two layers around the latent, with an exact GELU between them."""

    def __init__(self, c_in: int, hidden: int, c_out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(c_in, hidden), nn.GELU(), nn.Linear(hidden, c_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, c_in] to [B, N, c_out]."""
        return self.layers(x)


class SmoothHead(nn.Module):
    """Tokens to pixels by a linear layer, then a 3x3 convolution that hides the patches' seams."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.linear_pred = nn.Linear(width, side * side * 3)
        self.conv_smoother = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map tokens [B, h*w, D] to images [B, 3, h*side, w*side]."""
        return self.conv_smoother(unpatchify(self.linear_pred(x), grid, self.side))


class ConvHead(nn.Module):
    """Tokens to pixels by a 2x2 convolution of the token map, padded right and below."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.conv_smoother = nn.Conv2d(width, side * side * 3, 2)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map tokens [B, h*w, D] to images [B, 3, h*side, w*side]."""
        tokens = x.transpose(1, 2).unflatten(2, grid)  # [B, D, h, w]
        patches = self.conv_smoother(F.pad(tokens, (0, 1, 0, 1))).flatten(2).transpose(1, 2)
        return unpatchify(patches, grid, self.side)


class LinearHead(nn.Linear):
    """Tokens to pixels by a linear layer."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__(width, side * side * 3)
        self.side = side

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Map tokens [B, h*w, D] to images [B, 3, h*side, w*side]."""
        assert grid is not None
        return unpatchify(super().forward(x), grid, self.side)


HEADS: dict[str, type[SmoothHead] | type[ConvHead] | type[LinearHead]] = {
    "smooth": SmoothHead,
    "conv": ConvHead,
    "linear": LinearHead,
}


class VMAE(nn.Module):
    """Variational masked autoencoder: a ViT encoder of visible patches, a ViT decoder of all.

    Args:
        config: sizes.
        channels: C of the latent; every patch gets C means and C logarithms of variances.
    """

    def __init__(self, config: ViTConfig, channels: int) -> None:
        super().__init__()
        self.config, self.channels = config, channels
        c, side = config, config.image_size // config.patch_size
        self.patch_embed = PatchEmbed(c.patch_size, c.embed_dim)
        # parameters and not buffers: the reference counts and stores them as weights
        self.pos_embed = nn.Parameter(sincos_table(c.embed_dim, side), requires_grad=False)
        self.blocks = _blocks(c.depth, c.embed_dim, c.num_heads, c.mlp_ratio)
        self.norm = nn.LayerNorm(c.embed_dim, eps=EPS)
        if c.down_nonlinear:
            self.to_latent: nn.Module = Resize(c.embed_dim, 4 * channels, 2 * channels)
            self.from_latent: nn.Module = Resize(channels, 4 * channels, c.embed_dim)
        else:
            self.to_latent = nn.Linear(c.embed_dim, 2 * channels)
            self.from_latent = nn.Linear(channels, c.embed_dim)
        self.decoder_embed = nn.Linear(c.embed_dim, c.decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_embed_dim))
        width = c.decoder_embed_dim
        self.decoder_pos_embed = nn.Parameter(sincos_table(width, side), requires_grad=False)
        self.decoder_blocks = _blocks(c.decoder_depth, width, c.decoder_num_heads, c.mlp_ratio)
        self.decoder_norm = nn.LayerNorm(width, eps=EPS)
        self.decoder_pred = HEADS[c.head](width, c.patch_size)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.config.embed_dim, -1))
        nn.init.normal_(self.mask_token, std=0.02)

    @property
    def encoder(self) -> nn.Module:
        """What the latent depends on."""
        return nn.ModuleList((self.patch_embed, self.blocks, self.norm, self.to_latent))

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Patches of images [B, 3, H, W] along both sides."""
        return images.shape[2] // self.config.patch_size, images.shape[3] // self.config.patch_size

    def encode_tokens(self, images: Tensor, hidden: Masking | None = None) -> Tensor:
        """Encode the visible patches of images [B, 3, H, W] in [-1, 1]; None hides nothing.

        Returns:
            [B, N_visible, 2C], mean then log variance, in the order of `hidden.shuffle`.
        """
        x = self.patch_embed(images) + resize_table(self.pos_embed, self.grid(images))
        if hidden is not None:
            keep = hidden.shuffle[:, : hidden.visible, None].expand(-1, -1, x.shape[2])
            x = x.gather(1, keep)
        return self.to_latent(self.norm(self.blocks(x)))

    def decode_tokens(
        self, z: Tensor, grid: tuple[int, int], hidden: Masking | None = None
    ) -> Tensor:
        """Decode latents [B, N_visible, C] to images [B, 3, H, W] of `grid` patches, not clamped.

        A hidden patch enters as the mask token.
        """
        x = self.decoder_embed(self.from_latent(z))
        if hidden is not None:
            rest = hidden.restore.shape[1] - hidden.visible
            x = torch.cat([x, self.mask_token.expand(len(x), rest, -1)], dim=1)
            x = x.gather(1, hidden.restore[:, :, None].expand(-1, -1, x.shape[2]))
        x = x + resize_table(self.decoder_pos_embed, grid)
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)), grid)

    def moments(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to mean and log variance [B, 2C, h, w]."""
        return self.encode_tokens(images).transpose(1, 2).unflatten(2, self.grid(images))

    def decode(self, z: Tensor) -> Tensor:
        """Map latents [B, C, h, w] to images [B, 3, H, W], not clamped."""
        grid = (z.shape[2], z.shape[3])
        return self.decode_tokens(z.flatten(2).transpose(1, 2), grid)

"""Paella's token predictor of 2022 (v1): a U-Net modulated by one CLIP vector, without attention.

Activations are channels last, [B, H, W, C]. Parameter names are the released ones.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.common.blocks import Block
from lightning_modules.common.guidance import Shares, equals, weighted
from lightning_modules.paella.config import V1Config
from lightning_modules.paella.network import Conv, ConvTranspose, Predict, timestep_embedding
from lightning_modules.paella.process import cosine_rate


class ModulatedLayerNorm(nn.Module):
    """gamma * s * LN(x) + beta * s, with scalar gamma and beta."""

    def __init__(self, width: int):
        super().__init__()
        self.ln = nn.LayerNorm(width, eps=1e-6)
        self.gamma = nn.Parameter(torch.randn(1, 1, 1))
        self.beta = nn.Parameter(torch.randn(1, 1, 1))

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        """x: [B, H, W, C], s: the same or [B, 1, 1, C]."""
        return torch.addcmul(self.beta * s, self.gamma * s, self.ln(x))


class ResBlock(Block):
    """Depthwise convolution (reflection padding), modulated norm, perceptron, layer scale."""

    def __init__(self, width: int, skip: int, c_cond: int):
        super().__init__()
        self.depthwise = nn.Sequential(nn.ReflectionPad2d(1), Conv(width, width, 3, groups=width))
        self.ln = ModulatedLayerNorm(width)
        self.channelwise = nn.Sequential(
            nn.Linear(width + skip, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))
        self.cond_mapper = nn.Linear(c_cond, width)

    def forward(self, x: Tensor, s: Tensor, skip: Tensor | None = None) -> Tensor:
        """x: [B, H, W, C], s: [B, H or 1, W or 1, c_cond], skip: [B, H, W, C]."""
        padded = self.depthwise[0](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = self.ln(self.depthwise[1](padded), self.cond_mapper(s))
        y = self.channelwise(y if skip is None else torch.cat([y, skip], dim=-1))
        return torch.addcmul(x, self.gamma, y)


class DenoiseUNet(nn.Module):
    """Token predictor v1.

    Args:
        config: sizes; the default is the released checkpoint (577,995,184 parameters).
    """

    def __init__(self, config: V1Config):
        super().__init__()
        self.config = config
        c = config
        last = len(c.down_levels) - 1
        widths = [c.c_hidden // 2 ** (last - level) for level in range(last + 1)]
        c_cond = c.c_clip + c.c_r
        self.embedding = nn.Embedding(c.num_labels, widths[0])

        self.down_blocks = nn.ModuleList()
        for level, count in enumerate(c.down_levels):
            blocks: list[nn.Module] = [ResBlock(widths[level], 0, c_cond) for _ in range(count)]
            if level > 0:
                blocks.insert(0, Conv(widths[level - 1], widths[level], 4, stride=2, padding=1))
            self.down_blocks.append(nn.ModuleList(blocks))

        self.up_blocks = nn.ModuleList()
        for i, count in enumerate(c.up_levels):
            width = widths[last - i]
            skips = [width if i > 0 and j == 0 else 0 for j in range(count)]
            blocks = [ResBlock(width, skip, c_cond) for skip in skips]
            if i < last:
                blocks.append(ConvTranspose(width, widths[last - i - 1], 4, stride=2, padding=1))
            self.up_blocks.append(nn.ModuleList(blocks))

        self.clf = nn.Conv2d(widths[0], c.num_labels, kernel_size=1)
        for levels, counts in ((self.down_blocks, c.down_levels), (self.up_blocks, c.up_levels)):
            for name, weight in levels.named_parameters():
                if name.endswith("channelwise.2.weight"):
                    weight.data.mul_(math.sqrt(1 / sum(counts)))

    def condition(self, c: Tensor, r: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """The modulating vector of every level: CLIP embedding and timestep embedding.

        Args:
            c: [B, c_clip], or a map [B, c_clip, H, W] that is resized to each level's grid.
            r: [B] in [0, 1], 0 = full noise.
            grid: height and width of the token grid.
        """
        time = timestep_embedding(cosine_rate(r), self.config.c_r).to(c.dtype)
        levels = range(len(self.config.down_levels))
        if c.dim() == 2:
            return [torch.cat([c, time], dim=1)[:, None, None] for _ in levels]
        time = time[:, :, None, None].expand(-1, -1, *c.shape[2:])
        maps = torch.cat([c, time], dim=1)  # [B, c_clip + c_r, H, W]
        sizes = [(grid[0] // 2**level, grid[1] // 2**level) for level in levels]
        return [
            F.interpolate(maps, size=size, mode="bilinear").permute(0, 2, 3, 1) for size in sizes
        ]

    def features(self, x: Tensor, r: Tensor, c: Tensor) -> Tensor:
        """What enters the output convolution.

        Args:
            x: [B, h, w] int64 tokens, h and w multiples of `config.grid_multiple`.
            r: [B] float in [0, 1], 0 = full noise.
            c: [B, c_clip] or [B, c_clip, h, w] (multi-conditioning); zeros are the null condition.

        Returns:
            [B, h, w, c_hidden / 2^(levels - 1)].

        Raises:
            ValueError: if the grid is not a multiple of what the network needs.
        """
        h, w = x.shape[1:]
        multiple = self.config.grid_multiple
        if h % multiple or w % multiple:
            raise ValueError(
                f"the token grid must be a multiple of {multiple} on both sides, got {h}x{w}"
            )
        conditions = self.condition(c, r, (h, w))
        hidden = self.embedding(x)
        outputs: list[Tensor] = []
        for level, s in zip(self.down_blocks, conditions, strict=True):
            hidden = _level(level, hidden, s)
            outputs.append(hidden)
        outputs.pop()
        for level, s in zip(self.up_blocks, reversed(conditions), strict=True):
            skip = outputs.pop() if level is not self.up_blocks[0] else None
            hidden = _level(level, hidden, s, skip)
        return hidden

    def head(self, rows: Tensor) -> Tensor:
        """[n, C] features -> [n, num_labels] logits."""
        return F.linear(rows, self.clf.weight.flatten(1), self.clf.bias)

    def mixed_rows(
        self,
        x: Tensor,
        r: Tensor,
        sides: Sequence[Tensor],
        shares: Shares,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Features of the kept tokens under several conditions, weighted and summed.

        The output is affine, so that with shares that sum to 1 this equals mixing the logits.
        Arguments as of `Paella.mixed_rows`; the sides are conditions c of `features`.
        """
        count = len(sides)
        features = self.features(x.repeat(count, 1, 1), r.repeat(count), torch.cat([*sides]))
        parts = features.chunk(count)
        kept = [part.flatten(0, 2) if keep is None else part[keep] for part in parts]
        return weighted(torch.stack(kept), shares)

    def predictor(self, c: Tensor, null: Tensor | None = None) -> Predict:
        """The `predict` of the sampling loop: `mixed_rows` with guidance; weight 1 is one pass.

        Args:
            c: [B, c_clip] or [B, c_clip, h, w].
            null: same shape; zeros if None.
        """
        null = torch.zeros_like(c) if null is None else null

        def predict(
            x: Tensor, r: Tensor, weight: float | Tensor, keep: Tensor | None = None
        ) -> Tensor:
            if equals(weight, 1):
                return self.mixed_rows(x, r, [c], [1.0], keep)
            return self.mixed_rows(x, r, [c, null], [weight, 1 - weight], keep)

        return predict

    def forward(self, x: Tensor, c: Tensor, r: Tensor) -> Tensor:
        """Logits [B, num_labels, h, w] of the clean tokens; arguments as of `features`."""
        return self.head(self.features(x, r, c)).permute(0, 3, 1, 2)


def _level(blocks: nn.Module, x: Tensor, s: Tensor, skip: Tensor | None = None) -> Tensor:
    """Blocks of one level; the first ResBlock takes the skip."""
    for block in blocks.children():
        if isinstance(block, ResBlock):
            x, skip = block(x, s, skip), None
        else:
            x = block(x)
    return x

"""Muse's super-resolution network: high-res tokens from low-res tokens and the caption (2.4).

A self-attention encoder reads the low-res tokens; its output and the projected text, one after
the other, are what the high-res tokens attend to. Among themselves these attend along two axes.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_modules.muse.config import SuperResConfig
from lightning_modules.muse.network import (
    MaskedBlock,
    MaskedTransformer,
    SelfAttention,
    Side,
    TokenGrid,
    norm,
)


class MultiAxisAttention(SelfAttention):
    """Half of the heads attend within local blocks, half across them (arXiv 2106.07631, 3.1).

    A local block is `block` x `block` neighbours; the other heads see one token of every block,
    those at the same place within it. A grid of n tokens costs n * (block^2 + n / block^2) / 2
    scores a head instead of n^2.
    """

    def __init__(self, config: SuperResConfig) -> None:
        super().__init__(config)
        self.block = config.block

    def attend_grid(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attend along both axes; all are [B, heads, h * w, d].

        Raises:
            ValueError: a grid that the blocks do not tile.
        """
        (h, w), b = grid, self.block
        if h % b or w % b:
            raise ValueError(f"the high-res grid must be a multiple of {b}, got {h}x{w}")
        batch, heads, n, d = q.shape
        # [B, heads / 2, h / b, w / b, b, b, d] for either half
        parts = [
            t.view(batch, heads, h // b, b, w // b, b, d).transpose(3, 4).chunk(2, dim=1)
            for t in (q, k, v)
        ]
        local, dilated = zip(*parts, strict=True)
        near = self.attend(*(self._sequences(t, (2, 3)) for t in local))
        far = self.attend(*(self._sequences(t, (4, 5)) for t in dilated))
        near = near.view(batch, h // b, w // b, heads // 2, b, b, d).permute(0, 3, 1, 4, 2, 5, 6)
        far = far.view(batch, b, b, heads // 2, h // b, w // b, d).permute(0, 3, 4, 1, 5, 2, 6)
        return torch.cat([near, far], dim=1).reshape(batch, heads, n, d)

    @staticmethod
    def _sequences(x: Tensor, apart: tuple[int, int]) -> Tensor:
        """[B, heads, ...] -> [B * those of the axes `apart`, heads, the others, d]."""
        together = tuple(axis for axis in (2, 3, 4, 5) if axis not in apart)
        y = x.permute(0, *apart, 1, *together, 6)
        return y.flatten(4, 5).flatten(0, 2)


class LowResEncoder(nn.Module):
    """Self-attention over the low-res tokens, with a table and positions of its own."""

    def __init__(self, config: SuperResConfig) -> None:
        super().__init__()
        self.embed = TokenGrid(config, config.low_num_codes, config.low_max_side)
        self.blocks = nn.ModuleList(
            MaskedBlock(config, SelfAttention(config), cross=False)
            for _ in range(config.low_layers)
        )
        self.norm = norm(config.hidden) if config.norm == "pre" else nn.Identity()

    def forward(self, low: Tensor) -> Tensor:
        """low: [B, h, w] int64 -> [B, h * w, D]."""
        x, grid = self.embed(low), (low.shape[1], low.shape[2])
        for block in self.blocks:
            x = block(x, grid)
        return self.norm(x)


class SuperRes(MaskedTransformer):
    """Predicts the masked high-res tokens from the others, the low-res tokens and the caption."""

    config: SuperResConfig

    def __init__(self, config: SuperResConfig) -> None:
        super().__init__(config)
        self.low = LowResEncoder(config)
        if config.place_low:
            self.place = nn.Linear(config.hidden, config.hidden, bias=False)
        self._initialise()

    def own_attention(self, config: SuperResConfig) -> SelfAttention:  # type: ignore[override]
        """Make the attention of the high-res tokens among themselves."""
        return MultiAxisAttention(config)

    def encode_low(self, low: Tensor) -> Tensor:
        """[B, h, w] int64 tokens of the low-res tokenizer -> [B, h * w, hidden], for `prepare`."""
        return self.low(low)

    def prepare(
        self,
        text: Tensor | None,
        mask: Tensor | None = None,
        drop: Tensor | None = None,
        low: Tensor | None = None,
    ) -> Side:
        """Keys and values of every block, of the low-res tokens and of the text behind them.

        Text, mask and drop are those of the base, for B images or for one; low [B, n, hidden] comes
        from `encode_low`, and both sides of a guidance may take the same.
        """
        if low is None:
            raise ValueError("the super-resolution network needs low, the encoded low-res tokens")
        sequence, mask, shown = self._text(text, mask, drop)
        batch, n = low.shape[:2]
        hide_low = self.config.drop_low and (text is None or drop is not None)
        if sequence is None:
            sequence, mask = low, None
        else:
            length = sequence.shape[1]
            if mask is None and (shown is not None or hide_low):
                mask = torch.ones(1, length, dtype=torch.bool, device=low.device)
            if mask is not None:
                seen = torch.ones(batch, n, dtype=torch.bool, device=low.device)
                if hide_low:
                    seen = seen & (~drop[:, None] if drop is not None else False)
                mask = mask if shown is None else mask & shown[:, None]
                mask = torch.cat([seen, mask.expand(batch, -1)], dim=1)
            sequence = torch.cat([low, sequence.expand(batch, -1, -1)], dim=1)
        side = Side([block.keys_values(sequence) for block in self._blocks()], batch)
        placed = self.place(low) if self.config.place_low else None
        return dataclasses.replace(side, mask=mask, placed=placed)

    def embedded(self, x: Tensor, sides: Sequence[Side]) -> Tensor:
        """The high-res tokens, with place_low together with the low-res tokens at their places."""
        placed = sides[0].placed  # [B, n, D]
        if placed is None:
            return self.embed(x)
        (h, w), n = x.shape[1:], placed.shape[1]
        scale = round((h * w / n) ** 0.5)
        grid = placed.view(-1, h // scale, w // scale, placed.shape[2])
        grid = grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        return self.embed(x) + grid.flatten(1, 2)

    def forward(
        self,
        x: Tensor,
        text: Tensor | None,
        mask: Tensor | None = None,
        drop: Tensor | None = None,
        low: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, h, w, outputs] of high-res tokens [B, h, w] over low-res ones [B, h', w']."""
        side = self.prepare(text, mask, drop, None if low is None else self.encode_low(low))
        return self.head(self.mixed_rows(x, [side], [1.0])).view(*x.shape, -1)

"""Muse's base transformer: masked image tokens that see each other and the caption (section 2.3).

The same class with one output per token is a Token-Critic, and `superres.py` builds on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.common.attention import attend
from lightning_modules.common.blocks import Block
from lightning_modules.common.guidance import Shares, weighted
from lightning_modules.muse.config import ModelConfig


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, heads * d] -> [B, heads, N, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class RMSNorm(nn.RMSNorm):
    """Division by the root of the mean square, in the weight's precision, then a gain."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., C] -> [..., C]."""
        return super().forward(x.to(self.weight.dtype))


def norm(width: int) -> nn.LayerNorm:
    """LayerNorm with a gain and without a bias."""
    return nn.LayerNorm(width, eps=1e-6, bias=False)


def all_equal(x: Tensor) -> bool:
    """Whether a batch of several holds one and the same thing: then one pass serves all."""
    return len(x) > 1 and bool((x == x[:1]).all())


class KeysValues(NamedTuple):
    """What one cross-attention reads of one condition."""

    keys: Tensor  # [B, heads, L, d]
    values: Tensor  # [B, heads, L, d]

    def take(self, images: Tensor) -> "KeysValues":
        """The same of some images [n]."""
        return KeysValues(self.keys[images], self.values[images])


@dataclass(frozen=True)
class Side:
    """Everything of one condition that does not depend on the image tokens.

    Attributes:
        blocks: keys and values of every block; none where there is nothing to attend to.
        batch: images it is for; 1 may serve any number.
        mask: [batch, L] bool, True where a key is real; None if all are.
        shown: [batch] bool, False where an image sees no key at all; None if all see.
        placed: [batch, n, D] what the embedded image tokens get besides, equal on all sides.
    """

    blocks: list[KeysValues] = field(default_factory=list)
    batch: int = 1
    mask: Tensor | None = None
    shown: Tensor | None = None
    placed: Tensor | None = None

    def take(self, images: Tensor) -> "Side":
        """The same of some images [n]; what serves any number stays."""
        if self.batch == 1:
            return self
        others = (t if t is None else t[images] for t in (self.mask, self.shown, self.placed))
        return Side([block.take(images) for block in self.blocks], len(images), *others)


@dataclass(frozen=True)
class Read:
    """What one block reads of the conditions.

    Attributes:
        sides: those that have keys, in the order of their rows.
        counts: rows of each; what follows after them attends to nothing.
        block: number of the block.
        rows: rows of every side, where up to this block all had the same ones.
    """

    sides: Sequence[Side]
    counts: Sequence[int]
    block: int
    rows: Sequence[int] | None = None


class Heads(nn.Module):
    """What both attentions share: heads, their optional norms, the output layer and dropout."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        width = config.hidden // config.heads
        self.q_norm = RMSNorm(width, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width, eps=1e-6) if config.qk_norm else nn.Identity()
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map queries [B, heads, N, d], keys and values [B, heads, L, d] to [B, heads, N, d]."""
        dropout = self.dropout if self.training else 0.0
        return attend(q, k, v, mask, dropout=dropout)


class SelfAttention(Heads):
    """The image tokens attend to each other."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x: [B, h * w, D] -> [B, h * w, D]."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        attended = self.attend_grid(self.q_norm(q), self.k_norm(k), v, grid)
        return self.out(attended.transpose(1, 2).flatten(2))

    def attend_grid(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attend over the whole grid; all are [B, heads, h * w, d]."""
        return self.attend(q, k, v)


class CrossAttention(Heads):
    """The image tokens attend to the condition."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.q = nn.Linear(config.hidden, config.hidden, bias=False)
        self.kv = nn.Linear(config.hidden, 2 * config.hidden, bias=False)

    def keys_values(self, sequence: Tensor) -> KeysValues:
        """sequence: [B, L, D]."""
        k, v = (split_heads(part, self.heads) for part in self.kv(sequence).chunk(2, dim=-1))
        return KeysValues(self.k_norm(k), v)

    def forward(
        self, x: Tensor, sides: Sequence[Side], counts: Sequence[int], block: int
    ) -> Tensor:
        """Attend to `block`'s keys of each side.

        Args:
            x: [rows, N, D], the images of one side after those of the other.
            sides: those that have keys, first of all.
            counts: rows of each; what follows after them attends to nothing and gets zeros.
            block: number of the block.

        Returns:
            [rows, N, D].
        """
        seeing = sum(counts)
        if not seeing:
            return torch.zeros_like(x)
        queries = self.q_norm(split_heads(self.q(x[:seeing]), self.heads))
        attended = []
        for q, side in zip(queries.split(list(counts)), sides, strict=True):
            own = side.blocks[block]
            k, v = (t.expand(len(q), -1, -1, -1) for t in (own.keys, own.values))
            mask = None if side.mask is None else side.mask[:, None, None]
            out = self.attend(q, k, v, mask)
            attended.append(out if side.shown is None else out * side.shown[:, None, None, None])
        merged = attended[0] if len(attended) == 1 else torch.cat(attended)
        out = self.out(merged.transpose(1, 2).flatten(2))
        return F.pad(out, (0, 0, 0, 0, 0, len(x) - seeing)) if seeing < len(x) else out


class LinearMLP(nn.Sequential):
    """mlp_type=linear: a layer on every token, GELU and another layer."""

    sees_neighbours = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(
            nn.Linear(config.hidden, config.mlp, bias=False),
            nn.GELU(),
            nn.Linear(config.mlp, config.hidden, bias=False),
        )

    def forward(  # type: ignore[override]
        self, x: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """x: [..., D] -> [..., D]; the grid does not matter to it."""
        return super().forward(x)


class ConvMLP(nn.Module):
    """mlp_type=conv: a 3x3 convolution on the token grid, GELU and another one."""

    sees_neighbours = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.into = nn.Conv2d(config.hidden, config.mlp, 3, padding=1, bias=False)
        self.out = nn.Conv2d(config.mlp, config.hidden, 3, padding=1, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x: [B, h * w, D] -> [B, h * w, D]."""
        pixels = x.unflatten(1, grid).permute(0, 3, 1, 2)  # [B, D, h, w], channels last
        return self.out(F.gelu(self.into(pixels))).permute(0, 2, 3, 1).flatten(1, 2)


MLPS: dict[str, type[LinearMLP | ConvMLP]] = {"linear": LinearMLP, "conv": ConvMLP}


class MaskedBlock(Block):
    """Self-attention, cross-attention to the condition, MLP (Figure 3), each with its residual.

    Args:
        config: its sizes.
        own: the attention of the tokens among themselves.
        cross: whether it attends to a condition.
    """

    ENTRIES = ("keys_values", "transform")

    def __init__(self, config: ModelConfig, own: SelfAttention, cross: bool = True) -> None:
        super().__init__()
        width = config.hidden
        self.pre = config.norm == "pre"
        self.own_norm, self.own = norm(width), own
        if cross:
            self.cross_norm, self.cross = norm(width), CrossAttention(config)
        self.mlp_norm = norm(width)
        self.mlp = MLPS[config.mlp_type](config)
        self.dropout = nn.Dropout(config.dropout)

    def keys_values(self, sequence: Tensor) -> KeysValues:
        """What this block reads of a condition [B, L, D]."""
        return self.cross.keys_values(sequence)

    def forward(
        self, x: Tensor, grid: tuple[int, int], read: Read | None = None, whole: bool = True
    ) -> Tensor:
        """Do all three parts, or the first alone where there is no condition.

        Args:
            x: [B, h * w, D].
            grid: h and w.
            read: what it attends to.
            whole: whether the MLP follows.

        Returns:
            [rows, h * w, D].
        """
        x = self._attend_own(x, grid)
        if read is not None:
            if read.rows is not None:
                x = torch.cat([x.expand(n, -1, -1) for n in read.rows])
            x = self._attend_condition(x, read.sides, read.counts, read.block)
        return self.transform(x, grid) if whole else x

    def _attend_own(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.pre:
            return x + self.dropout(self.own(self.own_norm(x), grid))
        return self.own_norm(x + self.dropout(self.own(x, grid)))

    def _attend_condition(
        self, x: Tensor, sides: Sequence[Side], counts: Sequence[int], block: int
    ) -> Tensor:
        if self.pre:
            if not counts:
                return x
            return x + self.dropout(self.cross(self.cross_norm(x), sides, counts, block))
        return self.cross_norm(x + self.dropout(self.cross(x, sides, counts, block)))

    def transform(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x: [B, h * w, D] -> [B, h * w, D]; without convolutions any tokens [..., D]."""
        if self.pre:
            return x + self.dropout(self.mlp(self.mlp_norm(x), grid))
        return self.mlp_norm(x + self.dropout(self.mlp(x, grid)))


class TokenGrid(nn.Module):
    """Tokens with learned 2D positions.

    Args:
        config: its `hidden`, `positions`, `norm` and `dropout`.
        ids: rows of the table.
        max_side: longest side of a grid.
    """

    def __init__(self, config: ModelConfig, ids: int, max_side: int) -> None:
        super().__init__()
        self.max_side = max_side
        width = config.hidden
        self.table = nn.Embedding(ids, width)
        self.factorised = config.positions == "factorised"
        if self.factorised:
            self.rows = nn.Parameter(torch.empty(max_side, width))
            self.columns = nn.Parameter(torch.empty(max_side, width))
        else:
            self.cells = nn.Parameter(torch.empty(max_side, max_side, width))
        self.norm = norm(width) if config.norm == "post" else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, h, w] int64 -> [B, h * w, D].

        Raises:
            ValueError: a grid longer than max_side.
        """
        h, w = x.shape[1:]
        if max(h, w) > self.max_side:
            raise ValueError(
                f"the network has positions for {self.max_side} tokens a side, got {h}x{w}; "
                "set max_side and train again"
            )
        if self.factorised:
            positions = self.rows[:h, None] + self.columns[:w]  # [h, w, D]
        else:
            positions = self.cells[:h, :w]
        return self.dropout(self.norm(self.table(x) + positions)).flatten(1, 2)


class MaskedTransformer(nn.Module):
    """Predicts the masked tokens of an image from the others and the caption.

    Args:
        config: sizes; `MODELS` has the paper's.
        outputs: numbers per token; None is one logit per code, 1 makes a Token-Critic.
    """

    config: ModelConfig

    def __init__(self, config: ModelConfig, outputs: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.mask_id = config.num_codes
        width = config.hidden
        self.tied = config.tied_head and outputs is None
        outputs = config.num_codes if outputs is None else outputs
        self.text = nn.Linear(config.text_width, width, bias=False)
        if config.null_text == "learned":
            self.null = nn.Parameter(torch.empty(1, 1, width))
        self.embed = TokenGrid(config, config.num_codes + 1, config.max_side)
        self.blocks = nn.ModuleList(
            MaskedBlock(config, self.own_attention(config)) for _ in range(config.layers)
        )
        self.norm = norm(width) if config.norm == "pre" else nn.Identity()
        self.head_mlp = (
            nn.Sequential(nn.Linear(width, width, bias=False), nn.GELU(), norm(width))
            if config.head_mlp
            else nn.Identity()
        )
        if not self.tied:
            self.table = nn.Parameter(torch.empty(outputs, width))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self._initialise()

    def own_attention(self, config: ModelConfig) -> SelfAttention:
        """Make the attention of the image tokens among themselves."""
        return SelfAttention(config)

    def _initialise(self) -> None:
        """Normal of deviation 0.02, cut at two deviations (MaskGIT); norms 1, bias 0."""
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04)

    def prepare(
        self, text: Tensor | None, mask: Tensor | None = None, drop: Tensor | None = None
    ) -> Side:
        """Keys and values of every block: once per prompt instead of once per step.

        Args:
            text: [B, L, text_width] states of the text encoder; None is the dropped caption for
                any number of images.
            mask: [B, L] bool, True where text holds a real token; None = all real.
            drop: [B] bool, True where the caption is dropped (in training).

        Raises:
            ValueError: a dropped caption with null_text=empty, whose text is that of ''.
        """
        sequence, mask, shown = self._text(text, mask, drop)
        if sequence is None:
            return Side()
        blocks = [block.keys_values(sequence) for block in self._blocks()]
        return Side(blocks, len(sequence), mask, shown)

    def _blocks(self) -> list[MaskedBlock]:
        return [block for block in self.blocks if isinstance(block, MaskedBlock)]

    def _text(
        self, text: Tensor | None, mask: Tensor | None, drop: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The projected text [B, L, D] (None: dropped for all), its mask, and who sees it."""
        null = self.config.null_text
        if null == "empty" and (text is None or drop is not None):
            raise ValueError("with null_text=empty a dropped caption is the text of ''; encode it")
        if text is None:
            return (self.null, None, None) if null == "learned" else (None, None, None)
        sequence = self.text(text)
        if drop is None:
            return sequence, mask, None
        if mask is None:
            mask = torch.ones(sequence.shape[:2], dtype=torch.bool, device=text.device)
        if null == "learned":
            sequence = torch.where(drop[:, None, None], self.null, sequence)
            first = torch.arange(sequence.shape[1], device=text.device) == 0
            return sequence, torch.where(drop[:, None], first, mask), None
        return sequence, mask | drop[:, None], ~drop  # a row without keys would give no number

    def mixed_rows(
        self, x: Tensor, sides: Sequence[Side], shares: Shares, keep: Tensor | None = None
    ) -> Tensor:
        """Features of the kept tokens under several conditions, weighted and summed.

        Guidance is sides (cond, null) with shares (s, 1 - s). The head is affine, so that with
        shares that sum to 1 mixing in front of it equals mixing the logits. All sides run as one
        batch, in one pass up to the first cross-attention, and images that are still all masks
        (the first step) share one pass per condition.

        Args:
            x: [B, h, w] int64, `mask_id` where a token is masked.
            sides: from `prepare`, each for B images or one for all of them.
            shares: one weight per side, summing to 1, see `weighted`.
            keep: [B, h, w] bool; None keeps all, and looks at no number.

        Returns:
            [keep.sum(), hidden], in the order of keep.nonzero(); `head` makes logits of them.
        """
        return weighted(self.rows(x, sides, keep), shares)

    def rows(self, x: Tensor, sides: Sequence[Side], keep: Tensor | None) -> Tensor:
        """Features [sides, keep.sum(), hidden] in front of the head; arguments as `mixed_rows`."""
        grid = (x.shape[1], x.shape[2])
        looks = keep is not None and not self.training and sides[0].placed is None
        same = looks and all_equal(x)
        own = [side.batch if same else len(x) for side in sides]
        # those that attend to something come first, so that one slice holds all of them
        order = sorted(range(len(sides)), key=lambda i: not sides[i].blocks)
        seeing = [sides[i] for i in order if sides[i].blocks]
        counts = [own[i] for i in order if sides[i].blocks]
        hidden = self.embedded(x[:1] if same else x, sides)
        blocks = self._blocks()
        for i, block in enumerate(blocks):
            # the first one attends to itself before any condition is seen
            read = Read(seeing, counts, i, [own[j] for j in order] if i == 0 else None)
            hidden = block(hidden, grid, read, i < len(blocks) - 1 or block.mlp.sees_neighbours)
        # what is left is done token by token
        parts = dict(zip(order, hidden.split([own[j] for j in order]), strict=True))
        each = [parts[j] for j in range(len(sides))]
        if keep is None:
            kept = torch.stack(each).flatten(1, 2)  # [sides, B h w, D]
        else:
            flat = keep.flatten(1)
            kept = torch.stack([part.expand(len(x), -1, -1)[flat] for part in each])
        if not blocks[-1].mlp.sees_neighbours:
            kept = blocks[-1].transform(kept, grid)
        return self.head_mlp(self.norm(kept))

    def embedded(self, x: Tensor, sides: Sequence[Side]) -> Tensor:
        """What the first block reads: x [B, h, w] int64 -> [B, h * w, D], alike for all sides."""
        return self.embed(x)

    def head(self, rows: Tensor) -> Tensor:
        """[n, hidden] features -> [n, outputs] logits."""
        table = self.embed.table.weight[: self.config.num_codes] if self.tied else self.table
        return F.linear(rows, table, self.bias)

    def forward(
        self,
        x: Tensor,
        text: Tensor | None,
        mask: Tensor | None = None,
        drop: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, h, w, outputs] of every token; arguments as in `prepare`."""
        rows = self.mixed_rows(x, [self.prepare(text, mask, drop)], [1.0])
        return self.head(rows).view(*x.shape, -1)

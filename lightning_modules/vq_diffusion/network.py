"""VQ-Diffusion's denoiser: a transformer over tokens that reads a text, a class or nothing.

Parameter names are the released ones of Text2ImageTransformer; its class and unconditional sisters
differ from it in one name (their `attn` is `attn1` here).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.common.attention import attend
from lightning_modules.common.blocks import Block, recompute_blocks
from lightning_modules.common.guidance import Shares, weighted
from lightning_modules.vq_diffusion.config import ModelConfig

EPS = 1e-5
ABSOLUTE_SCALE = 4000  # timesteps of the sinusoid, whatever the number of steps


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding [sin, cos] of t with periods up to 2 pi 10^4.

    Args:
        t: [n] float.
        width: number of features, even.

    Returns:
        [n, width] float32.
    """
    half = width // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32)
    angles = t.float()[:, None] * torch.exp(-steps * (math.log(10000) / (half - 1)))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def gelu2(x: Tensor) -> Tensor:
    """GELU2 of the released code: x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"GELU": F.gelu, "GELU2": gelu2}


def tile(x: Tensor, batch: int) -> Tensor:
    """Repeat x [B, ...] as a whole until it has `batch` rows (a multiple of B)."""
    times = batch // x.shape[0]
    return x if times == 1 else x.repeat(times, *[1] * (x.dim() - 1))


class AdaLayerNorm(nn.Module):
    """AdaLN: LayerNorm(x) * (1 + scale) + shift; (scale, shift) = Linear(SiLU(embedding of t)).

    The embedding is a table of this norm alone with one row per timestep, or the sinusoid of
    4000 t / T (`_abs`).
    """

    def __init__(self, width: int, rows: int, absolute: bool = False):
        super().__init__()
        self.width, self.rows, self.absolute = width, rows, absolute
        if not absolute:
            self.emb = nn.Embedding(rows, width)
        self.linear = nn.Linear(width, 2 * width)

    def embed(self, index: Tensor) -> Tensor:
        """[n] int64 in 0..rows-1 -> [n, D]."""
        if self.absolute:
            t = index / self.rows * ABSOLUTE_SCALE
            return sinusoid(t, self.width).to(self.linear.weight.dtype)
        return self.emb(index)

    def modulation(self, index: Tensor) -> Tensor:
        """[n] int64 -> scale and shift [n, 2 D]."""
        return self.linear(F.silu(self.embed(index)))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x: [M, N, D]; modulation: [B or 1, 2 D], for each B rows of x or for all of them."""
        scale, shift = modulation.to(x.dtype).chunk(2, dim=-1)  # they differ under autocast
        if modulation.shape[0] == 1:  # a batch of equal t is one plain LayerNorm
            return F.layer_norm(x, (self.width,), 1 + scale[0], shift[0], EPS)
        return self._modulate(F.layer_norm(x, (self.width,), eps=EPS), scale, shift)

    def _modulate(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        rows = x.shape[0]
        return torch.addcmul(tile(shift, rows)[:, None], x, 1 + tile(scale, rows)[:, None])


class ClassNorm(AdaLayerNorm):
    """AdaLN or AdaInsNorm of a class label; a label beyond the table is the mean of all classes.

    The released code looks at the first label of a batch and then means all of them.
    """

    def __init__(self, width: int, classes: int, instance: bool):
        super().__init__(width, classes)
        self.instance = instance

    def embed(self, index: Tensor) -> Tensor:
        """[n] int64 >= 0 -> [n, D]."""
        known = self.emb(index.clamp(max=self.rows - 1))
        return torch.where(index[:, None] < self.rows, known, self.emb.weight.mean(0))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x: [M, N, D]; modulation: [B or 1, 2 D]."""
        if not self.instance:
            return super().forward(x, modulation)
        normed = F.instance_norm(x.transpose(1, 2), eps=EPS).transpose(1, 2)  # over the tokens
        return self._modulate(normed, *modulation.chunk(2, dim=-1))


class KeysValues(NamedTuple):
    """What one block reads of a text; B may be 1 for a text of all images."""

    keys: Tensor  # [B, heads, L, d]
    values: Tensor  # [B, heads, L, d]
    mask: Tensor | None  # [B, L] bool, True = real; None = all are

    def take(self, images: Tensor) -> "KeysValues":
        """The same of some images [n]; what serves all images stays."""
        if len(self.keys) == 1:
            return self
        mask = self.mask if self.mask is None or len(self.mask) == 1 else self.mask[images]
        return KeysValues(self.keys[images], self.values[images], mask)


@dataclass(frozen=True)
class Side:
    """Everything of one condition that depends neither on the tokens nor on t.

    Per block: `KeysValues` of a text, scale and shift [B or 1, 2 D] of a class, or None.
    """

    blocks: list[Any]

    def take(self, images: Tensor) -> "Side":
        """The same of some images [n]; what serves all images stays."""

        def some(read: Any) -> Any:
            if isinstance(read, Tensor):
                return read if len(read) == 1 else read[images]
            return read if read is None else read.take(images)

        return Side([some(read) for read in self.blocks])


@dataclass
class Past:
    """What one causal block keeps of the tokens before: it grows by one per token."""

    keys: Tensor | None = None  # [M, heads, n, d]
    values: Tensor | None = None  # [M, heads, n, d]
    convolved: list[Tensor] = field(default_factory=list)  # inputs of the convolutions [M, n, C]

    @property
    def length(self) -> int:
        """Number of tokens seen."""
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [M, heads, 1, d] of a token; returns all of them."""
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values

    def convolve(self, index: int, x: Tensor) -> Tensor:
        """Add the input [M, 1, C] of convolution `index`; returns all of them [M, n, C]."""
        if index == len(self.convolved):
            self.convolved.append(x)
        else:
            self.convolved[index] = torch.cat([self.convolved[index], x], dim=1)
        return self.convolved[index]


class Attention(nn.Module):
    """The projections that self- and cross-attention share."""

    def __init__(self, config: ModelConfig, source: int):
        super().__init__()
        width = config.n_embd
        self.heads, self.causal = config.n_head, config.causal
        self.attn_dropout = config.attn_dropout
        self.key = nn.Linear(source, width)
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(source, width)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.dropout)

    def split(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, heads, N, d]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, **mask: Any) -> Tensor:
        """Scaled dot-product attention, [B, heads, N, d] -> [B, N, D]."""
        chance = self.attn_dropout if self.training else 0.0
        out = attend(query, keys, values, dropout=chance, **mask)
        return out.transpose(1, 2).flatten(2)


class SelfAttention(Attention):
    """The tokens attend to each other, or (causal) to those up to themselves."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, config.n_embd)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """x: [M, N, D]; with a past N is 1."""
        query, keys, values = (self.split(part(x)) for part in (self.query, self.key, self.value))
        if past is not None:
            keys, values = past.append(keys, values)
        out = self.attend(query, keys, values, causal=self.causal and past is None)
        return self.dropout(self.proj(out))


class CrossAttention(Attention):
    """The tokens attend to a text, padding included unless a mask hides it."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, config.condition_dim)

    def read(self, text: Tensor, mask: Tensor | None) -> KeysValues:
        """Keys and values of a text [B, L, condition_dim]."""
        return KeysValues(self.split(self.key(text)), self.split(self.value(text)), mask)

    def forward(self, x: Tensor, texts: Sequence[KeysValues]) -> Tensor:
        """x: [B * len(texts), N, D], the tokens of one text after the other."""
        attended = []
        for query, text in zip(self.split(self.query(x)).chunk(len(texts)), texts, strict=True):
            keys, values = (
                kv.expand(query.shape[0], -1, -1, -1) for kv in (text.keys, text.values)
            )
            mask = None if text.mask is None else text.mask[:, None, None]
            attended.append(self.attend(query, keys, values, mask=mask))
        return self.dropout(self.proj(attended[0] if len(texts) == 1 else torch.cat(attended)))


class Conv(nn.Conv2d):
    """3x3 convolution on channels-last activations; causal: of the tokens up to this one only."""

    # what comes before in raster order, and the token itself: (row, column) in the kernel
    TAPS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))

    def __init__(self, channels: int, width: int, causal: bool):
        super().__init__(channels, width, kernel_size=3, padding=1)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, h, w, C] -> [B, h, w, C']."""
        weight = self.weight
        if self.causal:
            seen = torch.zeros(3, 3, device=weight.device, dtype=weight.dtype)
            seen[tuple(zip(*self.TAPS, strict=True))] = 1
            weight = weight * seen
        return F.conv2d(x.permute(0, 3, 1, 2), weight, self.bias, padding=1).permute(0, 2, 3, 1)

    def last(self, x: Tensor, columns: int) -> Tensor:
        """The causal result [M, 1, C'] of the last of the tokens x [M, n, C] in raster order."""
        row, column = divmod(x.shape[1] - 1, columns)
        assert self.bias is not None
        out: Tensor = self.bias
        for dy, dx in self.TAPS:
            y, other = row + dy - 1, column + dx - 1
            if y >= 0 and 0 <= other < columns:
                out = out + F.linear(x[:, y * columns + other], self.weight[:, :, dy, dx])
        return out[:, None]


class ConvMLP(nn.Module):
    """conv_mlp: two 3x3 convolutions on the token grid."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, hidden = config.n_embd, config.mlp_hidden_times * config.n_embd
        self.conv1 = Conv(width, hidden, config.causal)
        self.conv2 = Conv(hidden, width, config.causal)
        self.activate = ACTIVATIONS[config.block_activate]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, grid: tuple[int, int], past: Past | None = None) -> Tensor:
        """x: [M, h w, D], or its newest token [M, 1, D] with a past."""
        if past is not None:
            hidden = self.activate(self.conv1.last(past.convolve(0, x), grid[1]))
            return self.conv2.last(past.convolve(1, hidden), grid[1])
        hidden = self.activate(self.conv1(x.unflatten(1, grid)))
        return self.dropout(self.conv2(hidden).flatten(1, 2))


class LinearMLP(nn.Sequential):
    """fc: two linear layers on every token."""

    def __init__(self, config: ModelConfig):
        width, hidden = config.n_embd, config.mlp_hidden_times * config.n_embd
        activate = nn.GELU() if config.block_activate == "GELU" else GELU2()
        super().__init__(
            nn.Linear(width, hidden), activate, nn.Linear(hidden, width), nn.Dropout(config.dropout)
        )

    def forward(  # type: ignore[override]
        self, x: Tensor, grid: tuple[int, int], past: Past | None = None
    ) -> Tensor:
        """x: [M, N, D]; grid and past do not matter to it."""
        return super().forward(x)


class GELU2(nn.Module):
    """`gelu2` as a module, to keep its place in the released numbering."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [...] -> [...]."""
        return gelu2(x)


MLPS: dict[str, type[nn.Module]] = {"fc": LinearMLP, "conv_mlp": ConvMLP}


class DenoiserBlock(Block):
    """x += SA(AdaLN(x, t)); text: x += CA(AdaLN(x, t), text); x += MLP(LN(x)).

    With a class the last norm is the one that the class modulates.
    """

    ENTRIES = ("read",)

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, absolute = config.n_embd, config.timestep_type == "adalayernorm_abs"
        self.condition = config.condition
        self.ln1 = AdaLayerNorm(width, config.diffusion_steps, absolute)
        self.attn1 = SelfAttention(config)
        if config.condition == "text":
            self.ln1_1 = AdaLayerNorm(width, config.diffusion_steps, absolute)
            self.attn2 = CrossAttention(config)
        self.ln2: nn.LayerNorm | ClassNorm = nn.LayerNorm(width, eps=EPS)
        if config.condition == "class":
            self.ln2 = ClassNorm(width, config.class_number, config.class_type == "adainsnorm")
        self.mlp = MLPS[config.mlp_type](config)

    def read(self, condition: Tensor | None, mask: Tensor | None) -> Any:
        """What this block reads of a condition, see `Side`."""
        if condition is None:
            return None
        if isinstance(self.ln2, ClassNorm):
            return self.ln2.modulation(condition)
        return self.attn2.read(condition, mask)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        reads: list[Any],
        batch: int,
        grid: tuple[int, int],
        past: Past | None = None,
    ) -> Tensor:
        """x: [B or batch, N, D], one side after the other -> [batch, N, D]; t: [B] or [1]."""
        x = x + self.attn1(self.ln1(x, self.ln1.modulation(t)), past)
        x = tile(x, batch)  # up to here all sides of the first block are the same
        if self.condition == "text":
            x = x + self.attn2(self.ln1_1(x, self.ln1_1.modulation(t)), reads)
        if isinstance(self.ln2, ClassNorm):
            each = batch // len(reads)
            one = len(reads) == 1
            modulation = reads[0] if one else torch.cat([tile(r, each) for r in reads])
            return x + self.mlp(self.ln2(x, modulation), grid, past)
        return x + self.mlp(self.ln2(x), grid, past)


class ContentEmbedding(nn.Module):
    """Token table (the last row is the mask) plus row table plus column table."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.spatial_size = (config.spatial_size[0], config.spatial_size[1])
        height, width = self.spatial_size
        self.emb = nn.Embedding(config.num_codes + 1, config.n_embd)
        self.height_emb: nn.Embedding | nn.Parameter
        self.width_emb: nn.Embedding | nn.Parameter
        if config.pos_emb_type == "embedding":
            self.height_emb = nn.Embedding(height, config.n_embd)
            self.width_emb = nn.Embedding(width, config.n_embd)
        else:
            self.height_emb = nn.Parameter(torch.zeros(1, height, config.n_embd))
            self.width_emb = nn.Parameter(torch.zeros(1, width, config.n_embd))

    def forward(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Embed tokens [B, n] int64 at the places `first`... in raster order: [B, n, D].

        A place is counted in the tables' columns, not in the grid's: a 16x16 grid with tables of
        32x32 uses rows 0..7, as the released models of that size were trained.

        Raises:
            ValueError: the tables have fewer places.
        """
        height, width = self.spatial_size
        last = first + tokens.shape[1]
        if last > height * width:
            raise ValueError(
                f"the position tables of {height}x{width} have no place for {last} tokens; "
                "model.spatial_size must be at least the token grid"
            )
        places = torch.arange(first, last, device=tokens.device)
        rows, columns = (
            table.weight if isinstance(table, nn.Embedding) else table[0]
            for table in (self.height_emb, self.width_emb)
        )
        return self.emb(tokens) + (rows[places // width] + columns[places % width])


class Denoiser(nn.Module):
    """Predicts the clean tokens of masked and replaced ones: p(x_0 | x_t, condition).

    There is no output for the mask: logits are over the K codes.

    Args:
        config: sizes; `MODELS` has the published ones.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.content_emb = ContentEmbedding(config)
        self.blocks = nn.ModuleList([DenoiserBlock(config) for _ in range(config.n_layer)])
        self.to_logits = nn.Sequential(
            nn.LayerNorm(config.n_embd, eps=EPS), nn.Linear(config.n_embd, config.num_codes)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        if config.checkpoint_blocks:
            recompute_blocks(self)

    @property
    def mask_token(self) -> int:
        """Index K of the mask."""
        return self.config.num_codes

    def prepare(self, condition: Tensor | None = None, mask: Tensor | None = None) -> Side:
        """What the blocks read of a condition: once per prompt instead of once per step.

        Args:
            condition: text: [B, L, condition_dim] token vectors; class: [B] int64 labels, one
                beyond the table is the null class; none: None. B may be 1 for all images.
            mask: text: [B, L] bool, True where a token is real; None attends to all of them.

        Raises:
            ValueError: a condition where the network takes none, or none where it takes one.
        """
        if (condition is None) != (self.config.condition == "none"):
            given = "none" if condition is None else "one"
            raise ValueError(f"model.condition is {self.config.condition}, but {given} was given")
        return Side([block.read(condition, mask) for block in self._blocks()])

    def _blocks(self) -> list[DenoiserBlock]:
        return [block for block in self.blocks if isinstance(block, DenoiserBlock)]

    def features(self, x: Tensor, t: Tensor, sides: Sequence[Side]) -> Tensor:
        """What enters the last norm.

        Args:
            x: [B, h, w] int64 in 0..K, K = mask. A causal network takes the clean tokens: it shifts
                them by one and puts the mask first, so that a token is predicted from those before.
            t: [B] int64 in 0..T-1; [1], or an expanded one, where all are equal.
            sides: conditions over the same tokens, run as one batch.

        Returns:
            [len(sides) * B, h * w, D], one side after the other.
        """
        tokens = x.flatten(1)
        if self.config.causal:
            tokens = F.pad(tokens[:, :-1], (1, 0), value=self.mask_token)
        return self._run(tokens, t, sides, (x.shape[1], x.shape[2]), [None] * len(self.blocks))

    def _run(
        self,
        tokens: Tensor,
        t: Tensor,
        sides: Sequence[Side],
        grid: tuple[int, int],
        pasts: Sequence[Past | None],
    ) -> Tensor:
        if t.stride(0) == 0:
            t = t[:1]
        batch = tokens.shape[0] * len(sides)
        past = pasts[0]
        hidden = self.content_emb(tokens, 0 if past is None else past.length)  # [B, N, D]
        for i, block in enumerate(self._blocks()):
            reads = [side.blocks[i] for side in sides]
            hidden = block(hidden, t, reads, batch, grid, pasts[i])
        return hidden

    def mixed_rows(
        self,
        x: Tensor,
        t: Tensor,
        sides: Sequence[Side],
        shares: Shares,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Normed features of the kept tokens under several conditions, weighted and summed.

        Guidance is sides (condition, null) with shares (s, 1 - s). The output layer is affine, so
        that mixing in front of it with shares of sum 1 equals mixing the logits, and that equals
        log p_u + s (log p_c - log p_u) up to a constant per token, which a softmax takes out.

        Args:
            x: [B, h, w] int64.
            t: [B] or [1] int64.
            sides: from `prepare`, each for B images or one for all of them.
            shares: one weight per side, see `weighted`.
            keep: [B, h, w] bool; None keeps all.

        Returns:
            [keep.sum(), D], in the order of keep.nonzero().
        """
        hidden = self.features(x, t, sides)
        picked = (
            hidden.flatten(0, 1) if keep is None else hidden[tile(keep.flatten(1), len(hidden))]
        )
        return self._mix(picked, shares)

    def _mix(self, rows: Tensor, shares: Shares) -> Tensor:
        """Norm rows [len(shares) * n, D] and sum them over the sides: [n, D]."""
        parts = self.to_logits[0](rows).unflatten(0, (len(shares), -1))  # [sides, n, D]
        return weighted(parts, shares)

    def next_rows(
        self,
        x: Tensor,
        t: Tensor,
        sides: Sequence[Side],
        shares: Shares,
        pasts: Sequence[Past],
    ) -> Tensor:
        """The row of `mixed_rows` of the next token in raster order (a causal network).

        Args:
            x: [B, h, w] int64; the tokens from the next one on are not looked at.
            t: [B] or [1] int64.
            sides: from `prepare`.
            shares: one weight per side.
            pasts: `[Past() for _ in network.blocks]` at the first token, the same list afterwards.

        Returns:
            [B, D]; `pasts` has grown by the token.
        """
        place = pasts[0].length
        start = torch.full_like(x[:, :1, 0], self.mask_token)  # [B, 1]
        token = start if place == 0 else x.flatten(1)[:, place - 1 : place]
        hidden = self._run(token, t, sides, (x.shape[1], x.shape[2]), pasts)
        return self._mix(hidden[:, 0], shares)

    def head(self, rows: Tensor) -> Tensor:
        """[n, D] normed features -> [n, K] logits."""
        return self.to_logits[1](rows)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, h * w, K] of the clean tokens; arguments as in `prepare` and `features`."""
        side = self.prepare(condition, mask)
        return self.head(self.to_logits[0](self.features(x, t, [side])))

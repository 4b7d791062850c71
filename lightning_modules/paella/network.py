"""Paella's token predictor of 2023 (v3): a U-Net over token patches that sees text by attention.

Activations are channels last, [B, H, W, C], everywhere. Parameter names are the released ones.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.common.attention import attend
from lightning_modules.common.blocks import Block
from lightning_modules.common.guidance import Shares, equals, weighted
from lightning_modules.paella.config import ModelConfig

EPS = 1e-6

Predict = Callable[..., Tensor]


def timestep_embedding(t: Tensor, width: int, max_positions: float = 10000.0) -> Tensor:
    """Sinusoidal embedding [sin, cos] of t * 10000, with one zero appended if width is odd.

    Args:
        t: [B] float, in [0, 1].
        width: number of features.

    Returns:
        [B, width] float32.
    """
    half = width // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32)
    frequencies = torch.exp(-steps * (math.log(max_positions) / (half - 1)))
    angles = (t * max_positions)[:, None] * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last axis without affine parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def tile(x: Tensor, batch: int) -> Tensor:
    """Repeat x [B, ...] as a whole until it has `batch` rows (a multiple of B)."""
    times = batch // x.shape[0]
    return x if times == 1 else x.repeat(times, *[1] * (x.dim() - 1))


def grid_norm(x: Tensor) -> Tensor:
    """L2 norm of every channel over the grid: [B, H, W, C] -> [B, 1, 1, C]."""
    if x.is_cuda:
        return x.norm(p=2, dim=(1, 2), keepdim=True)
    # on a CPU the plain sum is three times faster; 1e-30 keeps the gradient at norm 0 finite
    return (x.square().sum(dim=(1, 2), keepdim=True) + 1e-30).sqrt()


class Norm(nn.Module):
    """`layer_norm` as a module, to keep its place in the released numbering."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., C] -> [..., C]."""
        return layer_norm(x)


class Conv(nn.Conv2d):
    """Conv2d on channels-last activations."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, C] -> [B, H', W', C']."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvTranspose(nn.ConvTranspose2d):
    """ConvTranspose2d on channels-last activations."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """x: [B, H, W, C] -> [B, H', W', C']."""
        return super().forward(x.permute(0, 3, 1, 2), output_size).permute(0, 2, 3, 1)


class GlobalResponseNorm(nn.Module):
    """GRN of ConvNeXt V2 (arXiv 2301.00808, Algorithm 1): gamma * (x * N) + beta + x.

    N is the norm of a channel over the grid, divided by the mean of these norms.
    """

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def scale(self, norms: Tensor) -> Tensor:
        """1 + gamma * N, from the norms [B, 1, 1, C] of the channels."""
        return 1 + self.gamma * (norms / (norms.mean(dim=-1, keepdim=True) + EPS))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, C] -> [B, H, W, C]."""
        return torch.addcmul(self.beta, x, self.scale(grid_norm(x)))


class Perceptron(nn.Sequential):
    """The two layers of C and F blocks, with GRN between them."""

    CACHED = 2**19  # hidden numbers (2 MiB) that a core's cache holds

    def __init__(self, width: int, dropout: float):
        super().__init__(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            GlobalResponseNorm(4 * width),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, C] -> [B, H, W, C]."""
        if torch.is_grad_enabled() or x.is_cuda or torch.compiler.is_compiling():
            return super().forward(x)
        # sampling on a CPU is bound by memory here: few images at a time, everything in place
        images = max(1, self.CACHED // (4 * x[0].numel()))
        parts = [self._forward_in_place(part) for part in x.split(images)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _forward_in_place(self, x: Tensor) -> Tensor:
        widen, _, grn, dropout, narrow = self
        assert isinstance(grn, GlobalResponseNorm)
        hidden = torch.ops.aten.gelu_(widen(x))
        hidden.mul_(grn.scale(grid_norm(hidden))).add_(grn.beta)
        return narrow(dropout(hidden))


class ResBlock(Block):
    """C: depthwise convolution, LayerNorm, perceptron with GRN, residual.

    A skip is concatenated in front of a convolution that still has `width` groups, so output
    channel g sees channels 2g and 2g+1 of [x, skip]: the lower half of the outputs sees only x,
    the upper half only the skip. The released weights are made for that.
    """

    def __init__(self, width: int, skip: int, kernel_size: int, dropout: float):
        super().__init__()
        self.depthwise = Conv(
            width + skip, width, kernel_size, padding=kernel_size // 2, groups=width
        )
        self.channelwise = Perceptron(width, dropout)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """x, skip: [B, H, W, C] -> [B, H, W, C]."""
        both = x if skip is None else torch.cat([x, skip], dim=-1)
        return x + self.channelwise(layer_norm(self.depthwise(both)))


class FeedForwardBlock(Block):
    """F: LayerNorm, perceptron with GRN, residual."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.channelwise = Perceptron(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, C] -> [B, H, W, C]."""
        return x + self.channelwise(layer_norm(x))


class TimestepBlock(nn.Module):
    """T: x * (1 + a) + b, with a and b linear in the timestep embedding."""

    def __init__(self, width: int, c_r: int):
        super().__init__()
        self.mapper = nn.Linear(c_r, 2 * width)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        """x: [B, H, W, C], r: [B or 1, c_r]."""
        a, b = self.mapper(r)[:, None, None].chunk(2, dim=-1)  # [B or 1, 1, 1, C]
        return torch.addcmul(b, x, 1 + a)


class Attention(nn.Module):
    """Holder of the released name `attention.attn` and of the projections under it."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)


class AttnBlock(Block):
    """A: the grid's tokens attend to themselves (if self_attn) and to the condition, residual."""

    ENTRIES = ("keys_values",)

    def __init__(self, width: int, c_cond: int, heads: int, self_attn: bool, dropout: float):
        super().__init__()
        self.heads = heads
        self.self_attn = self_attn
        self.dropout = dropout
        self.attention = Attention(width, heads, dropout)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(c_cond, width))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, N, C] -> [B, heads, N, d]

    def keys_values(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the condition [B, S, c_cond], each [B, heads, S, d]."""
        attn = self.attention.attn
        width = attn.embed_dim
        kv = F.linear(
            self.kv_mapper(sequence), attn.in_proj_weight[width:], attn.in_proj_bias[width:]
        )
        keys, values = kv.chunk(2, dim=-1)
        return self._split(keys), self._split(values)

    def forward(self, x: Tensor, conditions: Sequence["KeysValues"]) -> Tensor:
        """x: [B * len(conditions), H, W, C], the tokens of one condition after the other."""
        attn = self.attention.attn
        width = attn.embed_dim
        rows = layer_norm(x).flatten(1, 2)  # [B, N, C]
        parts = 3 if self.self_attn else 1
        weight, bias = attn.in_proj_weight[: parts * width], attn.in_proj_bias[: parts * width]
        projected = [self._split(p) for p in F.linear(rows, weight, bias).chunk(parts, dim=-1)]
        attended = []  # [B, N, C] per condition
        chunks = zip(*(p.chunk(len(conditions)) for p in projected), strict=True)
        for (query, *own), condition in zip(chunks, conditions, strict=True):
            mask = condition.mask
            keys = condition.keys.expand(query.shape[0], -1, -1, -1)
            values = condition.values.expand(query.shape[0], -1, -1, -1)
            if own:
                keys = torch.cat([own[0], keys], dim=2)
                values = torch.cat([own[1], values], dim=2)
                if mask is not None:
                    mask = F.pad(mask, (query.shape[2], 0), value=True)
            shown = None if mask is None else mask[:, None, None]
            dropout = self.dropout if self.training else 0.0
            out = attend(query, keys, values, shown, dropout=dropout)
            attended.append(out.transpose(1, 2).flatten(2))
        merged = attended[0] if len(attended) == 1 else torch.cat(attended)
        return x + attn.out_proj(merged).view_as(x)


@dataclass(frozen=True)
class KeysValues:
    """What one attention block reads of one condition; B may be 1 for a condition of all images."""

    keys: Tensor  # [B, heads, S, d]
    values: Tensor  # [B, heads, S, d]
    mask: Tensor | None  # [B, S] bool, True = real

    def take(self, images: Tensor) -> "KeysValues":
        """The same of some images [n]; what serves all images stays."""
        if len(self.keys) == 1:
            return self
        mask = self.mask if self.mask is None or len(self.mask) == 1 else self.mask[images]
        return KeysValues(self.keys[images], self.values[images], mask)


@dataclass(frozen=True)
class Prepared:
    """Everything of one or more conditions that depends neither on the tokens nor on t."""

    blocks: list[list[KeysValues]] = field(default_factory=list)  # [attention block][condition]
    conditions: int = 1

    def __add__(self, other: "Prepared") -> "Prepared":
        """Both conditions over the same tokens, for one forward pass of guidance."""
        blocks = [mine + its for mine, its in zip(self.blocks, other.blocks, strict=True)]
        return Prepared(blocks, self.conditions + other.conditions)

    def take(self, images: Tensor) -> "Prepared":
        """The same of some images [n]."""
        blocks = [[read.take(images) for read in block] for block in self.blocks]
        return Prepared(blocks, self.conditions)


class Paella(nn.Module):
    """Token predictor v3: noised tokens, noise rate and condition -> logits of the clean tokens.

    Args:
        config: sizes; the default is the released checkpoint (1,008,350,592 parameters).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        c = config
        last = len(c.c_hidden) - 1

        self.byt5_mapper = nn.Linear(c.byt5_embd, c.c_cond)
        if c.clip_embd > 0:
            self.clip_mapper = nn.Linear(c.clip_embd, c.c_cond * c.clip_seq_len)
            if c.clip_image:
                self.clip_image_mapper = nn.Linear(c.clip_embd, c.c_cond * c.clip_seq_len)

        self.in_mapper = nn.Sequential(nn.Embedding(c.num_labels, c.c_in), Norm())
        patch = c.patch_size**2
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(c.patch_size), nn.Conv2d(c.c_in * patch, c.c_hidden[0], 1), Norm()
        )

        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(c.c_hidden):
            blocks = self._level(level, skip=0)
            if level > 0:
                shrink = Conv(c.c_hidden[level - 1], width, kernel_size=2, stride=2)
                blocks.insert(0, nn.Sequential(Norm(), shrink))
            self.down_blocks.append(nn.ModuleList(blocks))

        self.up_blocks = nn.ModuleList()
        for level in range(last, -1, -1):
            width = c.c_hidden[level]
            blocks = self._level(level, skip=width if level < last else 0)
            if level > 0:
                grow = ConvTranspose(width, c.c_hidden[level - 1], kernel_size=2, stride=2)
                blocks.append(nn.Sequential(Norm(), grow))
            self.up_blocks.append(nn.ModuleList(blocks))

        self.clf = nn.Sequential(
            Norm(), nn.Conv2d(c.c_hidden[0], c.c_out * patch, 1), nn.PixelShuffle(c.patch_size)
        )
        self.out_mapper = nn.Sequential(Norm(), nn.Conv2d(c.c_out, c.num_labels, 1, bias=False))
        self._initialise()

    def _level(self, level: int, skip: int) -> list[nn.Module]:
        """Blocks of one level; only its very first block can take the skip."""
        c = self.config
        width = c.c_hidden[level]
        blocks: list[nn.Module] = []
        for kind in c.level_config[level] * c.blocks[level]:
            if kind == "C":
                first_skip = 0 if blocks else skip
                blocks.append(ResBlock(width, first_skip, c.kernel_size, c.dropout))
            elif kind == "T":
                blocks.append(TimestepBlock(width, c.c_r))
            elif kind == "A":
                blocks.append(AttnBlock(width, c.c_cond, c.nhead[level], c.self_attn, c.dropout))
            else:
                blocks.append(FeedForwardBlock(width, c.dropout))
        return blocks

    def _initialise(self) -> None:
        """Released initialisation: logits are exactly 0 at step 0."""
        shrink = math.sqrt(1 / sum(self.config.blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, weight in self.named_parameters():
            if name in ("byt5_mapper.weight", "clip_mapper.weight", "clip_image_mapper.weight"):
                nn.init.normal_(weight, std=0.02)
            elif name.endswith("channelwise.4.weight"):
                weight.data.mul_(shrink)
        for module in self.modules():
            if isinstance(module, TimestepBlock):
                nn.init.zeros_(module.mapper.weight)
        nn.init.xavier_uniform_(self.get_parameter("embedding.1.weight"), gain=0.02)
        nn.init.zeros_(self.get_parameter("clf.1.weight"))
        table = self.get_parameter("in_mapper.0.weight")
        nn.init.normal_(table, std=math.sqrt(1 / self.config.num_labels))
        self.get_parameter("out_mapper.1.weight").data.copy_(table.data[:, :, None, None])

    def condition(
        self,
        byt5: Tensor,
        clip: Tensor | None = None,
        clip_image: Tensor | Sequence[Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Conditioning sequence: text tokens, then clip_seq_len tokens per pooled embedding.

        Args:
            byt5: [B, L, byt5_embd] token states of the text encoder.
            clip: [B, clip_embd] pooled text embedding, or None.
            clip_image: one or several [B, clip_embd] pooled image embeddings, or None.
            mask: [B, L] bool, True where byt5 holds a real token; None = all real.

        Returns:
            The normed sequence [B, S, c_cond] and its mask [B, S] (None if all are real).

        Raises:
            ValueError: if the network was built without the mapper of a given part.
        """
        parts = [self.byt5_mapper(byt5)]
        if clip is not None:
            parts.append(self._pooled_tokens("clip_mapper", clip))
        images = [clip_image] if isinstance(clip_image, Tensor) else clip_image or []
        parts.extend(self._pooled_tokens("clip_image_mapper", image) for image in images)
        sequence = layer_norm(torch.cat(parts, dim=1))
        if mask is not None:
            mask = F.pad(mask, (0, sequence.shape[1] - mask.shape[1]), value=True)
        return sequence, mask

    def _pooled_tokens(self, name: str, pooled: Tensor) -> Tensor:
        if not hasattr(self, name):
            raise ValueError(
                f"this network has no {name}: set clip_embd (and clip_image for images) in its "
                "config, or leave this part of the condition out"
            )
        return getattr(self, name)(pooled).unflatten(-1, (self.config.clip_seq_len, -1))

    def prepare(
        self, sequence: Tensor, mask: Tensor | None = None, attn_weights: Tensor | None = None
    ) -> Prepared:
        """Keys and values of every attention block: once per prompt instead of once per step.

        Args:
            sequence: [B, S, c_cond] from `condition`.
            mask: [B, S] bool or None.
            attn_weights: [n] or [B, n], n <= S: the attention probabilities of the last n keys
                are multiplied by these, without renormalising. That equals scaling the values.

        Raises:
            ValueError: if there are more attn_weights than conditioning tokens.
        """
        count = sequence.shape[1]
        scale = None
        if attn_weights is not None:
            weights = torch.atleast_2d(attn_weights)
            if weights.shape[-1] > count:
                raise ValueError(
                    f"attn_weights has {weights.shape[-1]} entries but the condition has only "
                    f"{count} tokens"
                )
            scale = F.pad(weights, (count - weights.shape[-1], 0), value=1.0)[:, None, :, None]
        blocks = []
        for block in self._attention_blocks():
            keys, values = block.keys_values(sequence)
            values = values if scale is None else values * scale
            blocks.append([KeysValues(keys, values, mask)])
        return Prepared(blocks)

    def _attention_blocks(self) -> list[AttnBlock]:
        levels = [*self.down_blocks, *self.up_blocks]
        return [b for level in levels for b in level.children() if isinstance(b, AttnBlock)]

    def features(self, x: Tensor, t: Tensor, cond: Prepared) -> Tensor:
        """What enters the output LayerNorm and table.

        Args:
            x: [B, h, w] int64 tokens, h and w multiples of `config.grid_multiple`.
            t: [B] (or [1]) float in [0, 1], the noise rate.
            cond: from `prepare`; a sum of several is applied to the same tokens.

        Returns:
            [conditions * B, h, w, c_out], one condition after the other.

        Raises:
            ValueError: if the grid is not a multiple of what the network needs.
        """
        h, w = x.shape[1:]
        multiple = self.config.grid_multiple
        if h % multiple or w % multiple:
            raise ValueError(
                f"the token grid must be a multiple of {multiple} on both sides, got {h}x{w}"
            )
        r = timestep_embedding(t, self.config.c_r).to(self.byt5_mapper.weight.dtype)
        batch = x.shape[0] * cond.conditions
        reads = iter(cond.blocks)

        hidden = self._to_patches(x)
        outputs = []
        for level in self.down_blocks:
            hidden = self._level_forward(level, hidden, r, reads, batch)
            outputs.append(hidden)
        skip = None
        outputs.pop()
        for level in self.up_blocks:
            hidden = self._level_forward(level, hidden, r, reads, batch, skip)
            skip = outputs.pop() if outputs else None
        return self._to_tokens(tile(hidden, batch))

    def _level_forward(
        self,
        level: nn.Module,
        x: Tensor,
        r: Tensor,
        reads: Iterator[list[KeysValues]],
        batch: int,
        skip: Tensor | None = None,
    ) -> Tensor:
        """Before the first attention block all conditions share one x: [B or batch, H, W, C]."""
        for block in level.children():
            if isinstance(block, AttnBlock):
                x = block(tile(x, batch), next(reads))
            elif isinstance(block, TimestepBlock):
                x = block(x, r if r.shape[0] == 1 else tile(r, x.shape[0]))
            elif isinstance(block, ResBlock) and skip is not None:
                x = block(x, tile(skip, x.shape[0]))
            else:
                x = block(x)
            skip = None  # only the first block of a level can take it
        return x

    def _to_patches(self, x: Tensor) -> Tensor:
        """[B, h, w] tokens -> [B, h/p, w/p, c_hidden[0]]."""
        p = self.config.patch_size
        tokens = self.in_mapper(x).permute(0, 3, 1, 2)
        # unshuffling and a 1x1 convolution are one convolution of kernel and stride p
        weight = self.get_parameter("embedding.1.weight").view(-1, self.config.c_in, p, p)
        bias = self.get_parameter("embedding.1.bias")
        return layer_norm(F.conv2d(tokens, weight, bias, stride=p).permute(0, 2, 3, 1))

    def _to_tokens(self, x: Tensor) -> Tensor:
        """[B, h/p, w/p, c_hidden[0]] -> [B, h, w, c_out]."""
        p = self.config.patch_size
        # rows reordered from (c, dy, dx) to (dy, dx, c), so that shuffling moves whole vectors
        weight = self.get_parameter("clf.1.weight").view(-1, p * p, x.shape[-1])
        bias = self.get_parameter("clf.1.bias").view(-1, p * p)
        y = F.linear(layer_norm(x), weight.transpose(0, 1).flatten(0, 1), bias.t().flatten())
        return y.unflatten(-1, (p, p, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def head(self, rows: Tensor) -> Tensor:
        """[n, c_out] normed features -> [n, num_labels] logits."""
        return F.linear(rows, self.get_parameter("out_mapper.1.weight").flatten(1))

    def mixed_rows(
        self,
        x: Tensor,
        t: Tensor,
        sides: Sequence[Prepared],
        shares: Shares,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Normed features of the kept tokens under several conditions, weighted and summed.

        Guidance is sides (cond, null) with shares (w, 1 - w). Mixing in front of the bias-free
        output table equals mixing the logits at a fraction of the cost; the sides share one pass
        up to the first attention block.

        Args:
            x: [B, h, w] int64.
            t: [B] or [1] float.
            sides: from `prepare`, each for B images or one for all of them.
            shares: one weight per side, see `weighted`.
            keep: [B, h, w] bool; None keeps all.

        Returns:
            [keep.sum(), c_out], in the order of keep.nonzero().
        """
        parts = self.features(x, t, sum(sides[1:], sides[0])).chunk(len(sides))
        kept = [part.flatten(0, 2) if keep is None else part[keep] for part in parts]
        return weighted(torch.stack([layer_norm(part) for part in kept]), shares)  # [sides, n, C]

    def predictor(self, cond: Prepared, null: Prepared | None = None) -> Predict:
        """The `predict` of the sampling loop: `mixed_rows` with guidance; weight 1 is one pass.

        Args:
            cond: condition of every image.
            null: empty (or negative) condition, of every image or one for all.
        """

        def predict(
            x: Tensor, t: Tensor, weight: float | Tensor, keep: Tensor | None = None
        ) -> Tensor:
            if equals(weight, 1):
                return self.mixed_rows(x, t, [cond], [1.0], keep)
            if null is None:
                raise ValueError(f"guidance weight {weight} needs a null condition")
            return self.mixed_rows(x, t, [cond, null], [weight, 1 - weight], keep)

        return predict

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        byt5: Tensor,
        clip: Tensor | None = None,
        clip_image: Tensor | Sequence[Tensor] | None = None,
        mask: Tensor | None = None,
        attn_weights: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, num_labels, h, w] of the clean tokens; arguments as in the methods above."""
        cond = self.prepare(*self.condition(byt5, clip, clip_image, mask), attn_weights)
        return self.head(layer_norm(self.features(x, t, cond))).permute(0, 3, 1, 2)

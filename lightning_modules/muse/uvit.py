"""aMUSEd's U-ViT: a transformer between two convolutional blocks, conditioned on CLIP's text.

Layout of huggingface/diffusers (src/diffusers/models/unets/uvit_2d.py) with its parameter names,
so that released checkpoints load as they are. No position is embedded: the 3x3 depthwise
convolutions carry it. Activations are channels last, [B, H, W, C], everywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.common.attention import attend
from lightning_modules.common.blocks import Block
from lightning_modules.common.guidance import Shares, weighted
from lightning_modules.muse.config import UViTConfig
from lightning_modules.muse.network import KeysValues, RMSNorm, split_heads


def sinusoids(values: Tensor, width: int) -> Tensor:
    """Embed numbers as [cos, sin] of value * 10000^(-i / (width / 2)).

    Args:
        values: [...] float.
        width: numbers per value, even.

    Returns:
        [..., width] float32.
    """
    half = width // 2
    steps = torch.arange(half, device=values.device, dtype=torch.float32)
    angles = values[..., None] * torch.exp(steps * (-math.log(10000.0) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def fold(size: int, edge: int) -> Tensor:
    """Number of the line that stands for each of `size` alike lines, of which `edge` at either end
    are told apart: 0, 1, ..., edge, edge, ..., edge, edge + 1, ..., 2 edge. [size] int64.
    """
    lines = torch.arange(size)
    return torch.maximum(lines.clamp(max=edge), lines - max(0, size - (2 * edge + 1)))


def linear(c_in: int, c_out: int) -> nn.Linear:
    """A linear layer without bias, as all of this network are."""
    return nn.Linear(c_in, c_out, bias=False)


class TokenEmbed(nn.Module):
    """Tokens to features: table, norm and a layer."""

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        c = config
        self.embeddings = nn.Embedding(c.vocab_size, c.in_channels)
        self.layer_norm = RMSNorm(c.in_channels, c.layer_norm_eps)
        self.conv = nn.Conv2d(c.in_channels, c.block_out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W] int64 -> [B, H, W, C]."""
        return F.linear(self.layer_norm(self.embeddings(x)), self.conv.weight.flatten(1))


class TwoLayers(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = linear(c_in, c_out), linear(c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, c_in] -> [B, c_out]."""
        return self.linear_2(F.silu(self.linear_1(x)))


@dataclass(frozen=True)
class UViTSide:
    """Everything of one condition that does not depend on the image tokens.

    Attributes:
        scales: gain and shift [2, batch, ...] of every adaptive norm, in order of use.
        reads: keys and values of every attention to the text, in order of use.
        batch: images it is for; 1 may serve any number.
        mask: [batch, L] bool, True where a text token is real; None if all are.
    """

    scales: list[Tensor]
    reads: list[KeysValues]
    batch: int
    mask: Tensor | None

    def take(self, images: Tensor) -> "UViTSide":
        """The same of some images [n]; what serves any number stays."""
        if self.batch == 1:
            return self
        mask = None if self.mask is None else self.mask[images]
        reads = [read.take(images) for read in self.reads]
        return UViTSide([s[:, images] for s in self.scales], reads, len(images), mask)


class Joint:
    """One pass of some images under several conditions, one after the other in the batch.

    Args:
        sides: the conditions.
        counts: how many images the pass has under each of them.

    Attributes:
        cells: [H, W] how many cells of the grid each cell stands for; None is one.
    """

    def __init__(self, sides: Sequence[UViTSide], counts: Sequence[int]) -> None:
        self.sides, self.counts = sides, list(counts)
        self.rows = sum(counts)
        self.cells: Tensor | None = None
        self._scales = zip(*(side.scales for side in sides), strict=True)
        self._reads = zip(*(side.reads for side in sides), strict=True)

    def next(self, scales: int = 0, reads: int = 0) -> "Share":
        """What the next block takes, which has so many adaptive norms and attentions to text."""
        gains = [self._gain_shift(next(self._scales)) for _ in range(scales)]
        return Share(self, gains, [next(self._reads) for _ in range(reads)])

    def _gain_shift(self, parts: Sequence[Tensor]) -> Tensor:
        pairs = zip(parts, self.counts, strict=True)
        spread = [part.expand(-1, n, *part.shape[2:]) for part, n in pairs]
        return spread[0] if len(spread) == 1 else torch.cat(spread, dim=1)

    def spread(self, x: Tensor) -> Tensor:
        """Repeat what is the same under all conditions: [B or 1, ...] -> [rows, ...]."""
        if len(x) == self.rows:
            return x
        return torch.cat([x.expand(n, *x.shape[1:]) for n in self.counts])


@dataclass(frozen=True)
class Share:
    """What one block takes of a pass.

    Attributes:
        joint: the pass.
        scales: gain and shift [2, rows, ...] of each of its adaptive norms.
        reads: what each of its attentions to the text reads of every condition.
    """

    joint: Joint
    scales: list[Tensor]
    reads: list[tuple[KeysValues, ...]]


class Attention(nn.Module):
    """Attention of image tokens to themselves or to the text."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([linear(width, width), nn.Dropout(dropout)])

    def keys_values(self, x: Tensor) -> KeysValues:
        """x: [B, L, C]."""
        k, v = (split_heads(part(x), self.heads) for part in (self.to_k, self.to_v))
        return KeysValues(k, v)

    def to_itself(self, x: Tensor, joint: Joint) -> Tensor:
        """x: [rows, N, C] -> [rows, N, C]."""
        own = self.keys_values(x)
        # a cell that stands for n has n keys: log n in front of the softmax
        bias = None if joint.cells is None else joint.cells.to(x.dtype).log().view(1, 1, 1, -1)
        q = split_heads(self.to_q(x), self.heads)
        return self._out(attend(q, own.keys, own.values, bias))

    def to_text(self, x: Tensor, joint: Joint, reads: Sequence[KeysValues]) -> Tensor:
        """x: [rows, N, C] -> [rows, N, C]."""
        queries = split_heads(self.to_q(x), self.heads).split(joint.counts)
        parts = []
        for q, side, own in zip(queries, joint.sides, reads, strict=True):
            k, v = (t.expand(len(q), -1, -1, -1) for t in (own.keys, own.values))
            mask = None if side.mask is None else side.mask[:, None, None]
            parts.append(attend(q, k, v, mask))
        return self._out(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _out(self, attended: Tensor) -> Tensor:
        merged = attended.transpose(1, 2).flatten(2)
        return self.to_out[1](self.to_out[0](merged))


class ResponseNorm(nn.Module):
    """GRN of ConvNeXt V2 (arXiv 2301.00808, Algorithm 1): gamma * (x * N) + beta + x.

    N is the norm of a channel over the grid, divided by the mean of these norms.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, x: Tensor, cells: Tensor | None = None) -> Tensor:
        """x: [B, H, W, C] -> [B, H, W, C]; cells: [H, W] how often each cell counts."""
        squares = x.square() if cells is None else x.square() * cells[:, :, None]
        # 1e-30 keeps the gradient at norm 0 finite
        norms = (squares.sum(dim=(1, 2), keepdim=True) + 1e-30).sqrt()  # [B, 1, 1, C]
        scale = 1 + self.gamma * (norms / (norms.mean(dim=-1, keepdim=True) + 1e-6))
        return torch.addcmul(self.beta, x, scale)


class ResBlock(Block):
    """Depthwise convolution, norm, two layers with GRN, residual, adaptive scale and shift."""

    ENTRIES = ("gain_shift",)

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        c, width = config, config.block_out_channels
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = RMSNorm(width, c.layer_norm_eps)
        self.channelwise_linear_1 = linear(width, 4 * width)
        self.channelwise_norm = ResponseNorm(4 * width)
        self.channelwise_linear_2 = linear(4 * width, width)
        self.dropout = nn.Dropout(c.hidden_dropout)
        self.cond_embeds_mapper = linear(c.hidden_size, 2 * width)

    def gain_shift(self, cond: Tensor) -> Tensor:
        """cond: [B, hidden] after SiLU -> [2, B, 1, 1, C]."""
        scale, shift = self.cond_embeds_mapper(cond).chunk(2, dim=1)
        return torch.stack([1 + scale, shift])[:, :, None, None]

    def forward(self, x: Tensor, share: Share) -> Tensor:
        """x: [B or rows, H, W, C] -> [rows, H, W, C]."""
        y = self.norm(self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        y = self.channelwise_norm(F.gelu(self.channelwise_linear_1(y)), share.joint.cells)
        x = x + self.dropout(self.channelwise_linear_2(y))
        gain, shift = share.scales[0]
        return torch.addcmul(shift, share.joint.spread(x), gain)


class TextBlock(Block):
    """Two attentions to the text, each with its residual; none among the image tokens."""

    ENTRIES = ("reads",)

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        c, width = config, config.block_out_channels
        if c.hidden_size != width:
            self.kv_mapper = linear(c.hidden_size, width)
        self.norm1, self.norm2 = RMSNorm(width, 1e-6), RMSNorm(width, 1e-6)
        self.attn1 = Attention(width, c.block_num_heads, c.attention_dropout)
        self.attn2 = Attention(width, c.block_num_heads, c.attention_dropout)

    def reads(self, text: Tensor) -> list[KeysValues]:
        """text: [B, L, hidden]."""
        if hasattr(self, "kv_mapper"):
            text = self.kv_mapper(F.silu(text))
        return [self.attn1.keys_values(text), self.attn2.keys_values(text)]

    def forward(self, x: Tensor, share: Share) -> Tensor:
        """x: [rows, N, C] -> [rows, N, C]."""
        first, second = share.reads
        x = x + self.attn1.to_text(self.norm1(x), share.joint, first)
        return x + self.attn2.to_text(self.norm2(x), share.joint, second)


class Downsample(nn.Module):
    """Norm and a convolution that halves the grid."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps)
        self.conv = nn.Conv2d(width, width, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, C] -> [B, H / 2, W / 2, C]."""
        return self.conv(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Upsample(nn.Module):
    """Norm and a transposed convolution that doubles the grid."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps)
        self.conv = nn.ConvTranspose2d(width, width, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, C] -> [B, 2 H, 2 W, C]."""
        return self.conv(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvBlock(nn.Module):
    """The blocks of one side of the transformer, with the change of resolution if there is one."""

    def __init__(self, config: UViTConfig, down: bool) -> None:
        super().__init__()
        c, width = config, config.block_out_channels
        if c.downsample and down:
            self.downsample = Downsample(width, c.layer_norm_eps)
        self.res_blocks = nn.ModuleList(ResBlock(c) for _ in range(c.num_res_blocks))
        self.attention_blocks = nn.ModuleList(TextBlock(c) for _ in range(c.num_res_blocks))
        if c.downsample and not down:
            self.upsample = Upsample(width, c.layer_norm_eps)

    def forward(self, x: Tensor, joint: Joint) -> Tensor:
        """x: [B or rows, H, W, C] -> [rows, H', W', C]."""
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        for res_block, attention_block in zip(self.res_blocks, self.attention_blocks, strict=True):
            x = res_block(x, joint.next(scales=1))
            x = attention_block(x.flatten(1, 2), joint.next(reads=2)).view_as(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class AdaptiveNorm(nn.Module):
    """norm(x) * (1 + scale) + shift, with scale and shift linear in the condition."""

    def __init__(self, width: int, eps: float, centred: bool = False) -> None:
        super().__init__()
        self.eps, self.centred = eps, centred
        self.linear = linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, bias=False) if centred else RMSNorm(width)

    def gain_shift(self, cond: Tensor) -> Tensor:
        """cond: [B, hidden] after SiLU -> [2, B, 1, hidden]; the norm's own gain is in it."""
        scale, shift = self.linear(cond).chunk(2, dim=1)
        return torch.stack([self.norm.weight * (1 + scale), shift])[:, :, None]

    def forward(self, x: Tensor, gain_shift: Tensor) -> Tensor:
        """x: [rows, N, D] -> [rows, N, D]; gain_shift: [2, rows, 1, D]."""
        gain, shift = gain_shift
        norm = F.layer_norm if self.centred else F.rms_norm
        return torch.addcmul(shift, norm(x.to(gain.dtype), x.shape[-1:], eps=self.eps), gain)


class GatedLinear(nn.Module):
    """GEGLU: the first half of the outputs times the GELU of the second."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width] -> [..., inner]."""
        values, gates = self.proj(x).chunk(2, dim=-1)
        return values * F.gelu(gates)


class FeedForward(nn.Module):
    """Gated MLP."""

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        gated, dropout = GatedLinear(width, inner), nn.Dropout(config.hidden_dropout)
        self.net = nn.Sequential(gated, dropout, linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, D] -> [B, N, D]."""
        return self.net(x)


class Layer(Block):
    """Self-attention, attention to the text, gated MLP, each behind an adaptive norm.

    The last of the three norms takes the mean out as well, the only one of the network that does.
    """

    ENTRIES = ("reads",)

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        c, width, eps = config, config.hidden_size, config.layer_norm_eps
        self.norm1, self.norm2 = AdaptiveNorm(width, eps), AdaptiveNorm(width, eps)
        self.norm3 = AdaptiveNorm(width, eps, centred=True)
        self.attn1 = Attention(width, c.num_attention_heads, c.hidden_dropout)
        self.attn2 = Attention(width, c.num_attention_heads, c.hidden_dropout)
        self.ff = FeedForward(c)

    def reads(self, cond: Tensor, text: Tensor) -> tuple[list[Tensor], KeysValues]:
        """Gain and shift of its norms, keys and values: cond [B, hidden], text [B, L, hidden]."""
        norms = (self.norm1, self.norm2, self.norm3)
        return [norm.gain_shift(cond) for norm in norms], self.attn2.keys_values(text)

    def forward(self, x: Tensor, share: Share) -> Tensor:
        """x: [rows, N, D] -> [rows, N, D]."""
        joint, (first, second, third) = share.joint, share.scales
        x = x + self.attn1.to_itself(self.norm1(x, first), joint)
        x = x + self.attn2.to_text(self.norm2(x, second), joint, share.reads[0])
        return x + self.ff(self.norm3(x, third))


class MaskedHead(nn.Module):
    """Layer, norm and output table."""

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        c = config
        self.conv1 = nn.Conv2d(c.block_out_channels, c.in_channels, 1, bias=False)
        self.layer_norm = RMSNorm(c.in_channels, c.layer_norm_eps)
        self.conv2 = nn.Conv2d(c.in_channels, c.codebook_size, 1, bias=False)

    def rows(self, x: Tensor) -> Tensor:
        """[..., block_out_channels] -> [..., in_channels], in front of the table."""
        return self.layer_norm(F.linear(x, self.conv1.weight.flatten(1)))


class UViT(nn.Module):
    """Predicts the masked tokens of an image from the others, the caption and micro-conditions.

    Args:
        config: sizes; the default is amused-256 (603,537,664 parameters).
    """

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        self.config = c = config
        self.mask_id = c.vocab_size - 1
        width, eps = c.hidden_size, c.layer_norm_eps
        self.encoder_proj = linear(c.encoder_hidden_size, width)
        self.encoder_proj_layer_norm = RMSNorm(width, eps)
        self.embed = TokenEmbed(c)
        self.cond_embed = TwoLayers(c.cond_embed_dim + c.micro_cond_embed_dim, width)
        self.down_block = ConvBlock(c, down=True)
        self.project_to_hidden_norm = RMSNorm(c.block_out_channels, eps)
        self.project_to_hidden = linear(c.block_out_channels, width)
        self.transformer_layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.project_from_hidden_norm = RMSNorm(width, eps)
        self.project_from_hidden = linear(width, c.block_out_channels)
        self.up_block = ConvBlock(c, down=False)
        self.mlm_layer = MaskedHead(c)
        self._initialise()

    def _initialise(self) -> None:
        """Released initialisation: no adaptation and logits that are exactly 0 at step 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        for module in self.modules():
            if isinstance(module, AdaptiveNorm):
                nn.init.zeros_(module.linear.weight)
            elif isinstance(module, ResBlock):
                nn.init.zeros_(module.cond_embeds_mapper.weight)
        nn.init.zeros_(self.mlm_layer.conv1.weight)
        table = self.embed.embeddings.weight.data[: self.config.codebook_size]
        self.mlm_layer.conv2.weight.data.copy_(table[:, :, None, None])

    def prepare(
        self, text: Tensor, pooled: Tensor, micro: Tensor, mask: Tensor | None = None
    ) -> UViTSide:
        """All that depends on the condition alone: once per prompt instead of once per step.

        Args:
            text: [B, L, encoder_hidden_size] states of the text encoder (CLIP-L's second last
                layer, padded to 77; aMUSEd attends to the padding). The dropped caption is ''.
            pooled: [B, cond_embed_dim] pooled and projected text vector.
            micro: [B or 1, 5] float: width, height, top and left of the crop, aesthetic score.
            mask: [B, L] bool, True where text holds a real token; None = all are attended to.
        """
        c = self.config
        embedded = sinusoids(micro, c.micro_cond_encode_dim).flatten(1).to(pooled.dtype)
        embedded = embedded.expand(len(pooled), -1)
        cond = F.silu(self.cond_embed(torch.cat([pooled, embedded], dim=1)))
        sequence = self.encoder_proj_layer_norm(self.encoder_proj(text))
        scales: list[Tensor] = []
        reads: list[KeysValues] = []
        for part in (self.down_block, self.transformer_layers, self.up_block):
            for module in part.modules():
                if isinstance(module, ResBlock):
                    scales.append(module.gain_shift(cond))
                elif isinstance(module, TextBlock):
                    reads.extend(module.reads(sequence))
                elif isinstance(module, Layer):
                    gains, keys = module.reads(cond, sequence)
                    scales.extend(gains)
                    reads.append(keys)
        return UViTSide(scales, reads, len(text), mask)

    def features(self, x: Tensor, joint: Joint) -> Tensor:
        """What enters the last layers: x [B, H, W] int64 -> [rows, H, W, block_out_channels]."""
        return self.up_block(self._middle(self.down_block(self.embed(x), joint), joint), joint)

    def _middle(self, grid: Tensor, joint: Joint) -> Tensor:
        """The transformer: [rows, H, W, block_out_channels] -> the same."""
        hidden = self.project_to_hidden(self.project_to_hidden_norm(grid.flatten(1, 2)))
        for layer in self.transformer_layers:
            hidden = layer(hidden, joint.next(scales=3, reads=1))
        return self.project_from_hidden(self.project_from_hidden_norm(hidden)).view_as(grid)

    def constant_features(self, x: Tensor, joint: Joint) -> Tensor:
        """`features` of a grid whose tokens are all the same, as at the first step.

        Without positions, cells differ only by their distance from the border, and only as far as
        the convolutions have carried it: n of them tell 2 n + 1 rows apart. So the rest of the
        rows (and columns) are computed once and count as many times as there are of them, which
        is exact and leaves, of the 256 cells of amused-256, 49 to the transformer.
        """
        f, edge = self.config.grid_multiple, self.config.num_res_blocks
        device = x.device
        inner = [fold(n // f, edge).to(device) for n in x.shape[1:]]  # seen by the transformer
        outer = [fold(n // f, 2 * edge).to(device) for n in x.shape[1:]]  # after the up block
        some = x[:, : f * (int(inner[0][-1]) + 1), : f * (int(inner[1][-1]) + 1)]
        joint.cells = torch.outer(*(lines.bincount() for lines in inner))
        grid = self._middle(self.down_block(self.embed(some), joint), joint)
        # from the coarser to the finer folding: any line that a finer one stands for will do
        rows, columns = (
            i.new_empty(int(o[-1]) + 1).scatter_(0, o, i) for i, o in zip(inner, outer, strict=True)
        )
        joint.cells = torch.outer(*(lines.bincount() for lines in outer))
        grid = self.up_block(grid[:, rows][:, :, columns], joint)
        rows, columns = (
            f * lines.repeat_interleave(f) + torch.arange(f * len(lines), device=device) % f
            for lines in outer
        )
        return grid[:, rows][:, :, columns]

    def mixed_rows(
        self, x: Tensor, sides: Sequence[UViTSide], shares: Shares, keep: Tensor | None = None
    ) -> Tensor:
        """Features of the kept tokens under several conditions, weighted and summed.

        Guidance is sides (cond, null) with shares (s, 1 - s): mixing in front of the bias-free
        output table equals mixing the logits. All sides run as one batch, in one pass up to the
        first sight of a condition. Images that are still all masks (the first step) share one pass
        per condition, over a folded grid.

        Args:
            x: [B, h, w] int64, `mask_id` where a token is masked.
            sides: from `prepare`, each for B images or one for all of them.
            shares: one weight per side, see `weighted`.
            keep: [B, h, w] bool; None keeps all, and looks at no number.

        Returns:
            [keep.sum(), in_channels], in the order of keep.nonzero(); `head` makes logits of them.

        Raises:
            ValueError: a grid that the network cannot halve.
        """
        multiple = self.config.grid_multiple
        if x.shape[1] % multiple or x.shape[2] % multiple:
            raise ValueError(
                f"the token grid must be a multiple of {multiple} on both sides, got "
                f"{x.shape[1]}x{x.shape[2]}"
            )
        constant = keep is not None and not self.training and bool((x == x[0, 0, 0]).all())
        joint = Joint(sides, [side.batch if constant else len(x) for side in sides])
        if constant:
            features = self.constant_features(x[:1], joint)
        else:
            features = self.features(x, joint)
        parts = features.split(joint.counts)
        if keep is None:
            kept = [part.flatten(0, 2) for part in parts]
        else:
            kept = [part.expand(len(x), -1, -1, -1)[keep] for part in parts]
        return weighted(self.mlm_layer.rows(torch.stack(kept)), shares)  # rows [sides, n, C]

    def head(self, rows: Tensor) -> Tensor:
        """[n, in_channels] features -> [n, codebook_size] logits."""
        return F.linear(rows, self.mlm_layer.conv2.weight.flatten(1))

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        pooled: Tensor,
        micro: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, h, w, codebook_size] of every token; arguments as in `prepare`."""
        side = self.prepare(text, pooled, micro, mask)
        return self.head(self.mixed_rows(x, [side], [1.0])).view(*x.shape, -1)

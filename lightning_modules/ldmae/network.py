"""LightningDiT as LDMAE runs it: the velocity of a latent, by labels, captions or nothing.

Parameter names and buffers are the released ones; the cross-attention to captions is ours. What a
condition gives is prepared once per prompt (`Side`), what the time gives once per step.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.common.attention import attend
from lightning_modules.common.blocks import Block, recompute_blocks
from lightning_modules.ldmae.config import DiTConfig
from lightning_modules.ldmae.vmae import sincos_table

EPS = 1e-6
FREQUENCIES = 256  # width of the sinusoids of the time


@dataclass
class Side:
    """One condition, prepared once per prompt; R is B, or 1 where all samples share it.

    Attributes:
        vector: [R, D] what is added to the embedding of the time.
        text: keys and values [R, heads, L, D/heads] of every block; empty without text.
        mask: [R, 1, 1, L] bool, True where a token is real; None where all are.
    """

    vector: Tensor
    text: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    mask: Tensor | None = None


def timestep_embedding(t: Tensor) -> Tensor:
    """Sinusoids [cos, sin] of t 10000^(-i/128), i = 0..127, of the time as it is.

    Args:
        t: [B] float: 0 (noise) to 1 (data), or the step of a DDPM chain.

    Returns:
        [B, 256] float32.
    """
    half = FREQUENCIES // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32)
    angles = t[:, None].float() * torch.exp(-math.log(10000) / half * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def at_least_single(x: Tensor) -> Tensor:
    """Bring half precision to float32."""
    return x.float() if x.element_size() < 4 else x


class Rotation(nn.Module):
    """Two-dimensional rotary positions (EVA): half of a head turns by the row, half by the column.

    Neighbouring numbers (2i, 2i+1) are a pair that turns by position * 10000^(-2k/d), d = width/2,
    k = 0..d/2-1.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        half = width // 2
        rates = 10000.0 ** -(torch.arange(0, half, 2).float() / half)
        angles = (torch.arange(side).float()[:, None] * rates).repeat_interleave(2, dim=1)
        row = angles[:, None].expand(-1, side, -1)
        column = angles[None].expand(side, -1, -1)
        table = torch.cat([row, column], dim=2).flatten(0, 1)  # [N, width]
        self.register_buffer("freqs_cos", table.cos())
        self.register_buffer("freqs_sin", table.sin())

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., N, width] -> [..., N, width]: (a, b) -> (a cos - b sin, b cos + a sin)."""
        # a pair is a complex number: one product instead of four and their copies
        pairs = torch.view_as_complex(at_least_single(x).unflatten(-1, (-1, 2)))
        cos, sin = (at_least_single(f[:, ::2]) for f in (self.freqs_cos, self.freqs_sin))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


class _Normalise(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) over the last axis; autograd's own way back takes twice as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        factor = x.square().mean(-1, keepdim=True).add_(EPS).rsqrt_()
        y = x * factor
        ctx.save_for_backward(y, factor)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        y, factor = ctx.saved_tensors
        along = (gradient * y).mean(-1, keepdim=True)
        return torch.addcmul(gradient, y, along, value=-1).mul_(factor)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * weight, the mean in float32 whatever the precision."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def unweighted(self, x: Tensor) -> Tensor:
        """x: [..., width] -> [..., width], without the weight."""
        return _Normalise.apply(at_least_single(x)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width] -> [..., width]."""
        return self.unweighted(x) * self.weight


def linear(inputs: int, outputs: int, std: float | None = None) -> nn.Linear:
    """Make a linear map with zero biases and weights of Xavier's uniform law or N(0, std)."""
    made = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(made.weight) if std is None else nn.init.normal_(made.weight, std=std)
    nn.init.zeros_(made.bias)
    return made


def norm(config: DiTConfig) -> nn.Module:
    """Make the norm in front of attention, feed-forward part and output."""
    if config.use_rmsnorm:
        return RMSNorm(config.hidden_size)
    return nn.LayerNorm(config.hidden_size, eps=EPS, elementwise_affine=False)


def head_norm(config: DiTConfig) -> nn.Module:
    """Make the norm of a head's queries or keys."""
    width = config.hidden_size // config.num_heads
    if not config.use_qknorm:
        return nn.Identity()
    return RMSNorm(width) if config.use_rmsnorm else nn.LayerNorm(width)


def modulate(norm: nn.Module, x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift. x: [B, N, D]; shift and scale: [B or 1, 1, D]."""
    factor = 1 + scale
    if isinstance(norm, RMSNorm):  # its weight joins the factor of a whole sample
        x, factor = norm.unweighted(x), norm.weight * factor
    else:
        x = norm(x)
    return x * factor if shift is None else torch.addcmul(shift, x, factor)


class PatchEmbed(nn.Module):
    """Latents to tokens: one linear map per patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, patch, stride=patch)
        nn.init.xavier_uniform_(self.proj.weight.view(config.hidden_size, -1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W] -> [B, N, D]."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Times to vectors: sinusoids, then two linear maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first = linear(FREQUENCIES, width, std=0.02)
        self.mlp = nn.Sequential(first, nn.SiLU(), linear(width, width, std=0.02))

    def forward(self, t: Tensor) -> Tensor:
        """t: [B] -> [B, D]."""
        return self.mlp(timestep_embedding(t).to(next(self.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Labels to vectors; the last row is the null label, where labels are ever hidden."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        rows = config.num_classes + (config.class_dropout_prob > 0)
        self.embedding_table = nn.Embedding(rows, config.hidden_size)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:
        """labels: [R] int64 -> [R, D]."""
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Self-attention with normalised and rotated queries and keys."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = linear(config.hidden_size, 3 * config.hidden_size)
        self.q_norm, self.k_norm = head_norm(config), head_norm(config)
        self.proj = linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rotation: nn.Module) -> Tensor:
        """x: [B, N, D] -> [B, N, D]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # [B, heads, N, D / heads]
        q, k = rotation(self.q_norm(q)), rotation(self.k_norm(k))
        seen = attend(q, k, v)
        return self.proj(seen.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention from the latents to the tokens of a caption, without a gate (as PixArt's)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_heads
        self.norm = norm(config)
        self.q = linear(width, width)
        self.kv = linear(config.text_width, 2 * width)
        self.q_norm, self.k_norm = head_norm(config), head_norm(config)
        self.proj = linear(width, width, std=0.0)

    def prepare(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens [R, L, text_width] to keys and values [R, heads, L, D/heads]."""
        kv = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        k, v = kv.unbind(0)
        return self.k_norm(k), v

    def forward(self, x: Tensor, sides: Sequence[Side], block: int) -> Tensor:
        """x: [S B, N, D], one part per side -> [S B, N, D]."""
        q = self.q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        parts = self.q_norm(q).chunk(len(sides))  # S times [B, heads, N, D / heads]
        seen = [self._look(part, side, block) for part, side in zip(parts, sides, strict=True)]
        return self.proj(torch.cat(seen).transpose(1, 2).flatten(2))

    def _look(self, q: Tensor, side: Side, block: int) -> Tensor:
        k, v = (tensor.expand(q.shape[0], -1, -1, -1) for tensor in side.text[block])
        return attend(q, k, v, side.mask)


class SwiGLU(nn.Module):
    """w3(silu(gate) * value), gate and value from one linear map."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        hidden = int(2 / 3 * int(width * config.mlp_ratio))
        self.w12 = linear(width, 2 * hidden)
        self.w3 = linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, D] -> [B, N, D]."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Perceptron(nn.Module):
    """Linear, GELU (tanh), linear."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        hidden = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = linear(config.hidden_size, hidden)
        self.fc2 = linear(hidden, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, D] -> [B, N, D]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Modulation(nn.Sequential):
    """Shifts, scales and gates from the embedded time and condition; zeros at first."""

    def __init__(self, width: int, vectors: int) -> None:
        super().__init__(nn.SiLU(), linear(width, vectors * width, std=0.0))
        self.count = vectors


@dataclass
class Given:
    """What all blocks see of time, conditions and positions.

    Attributes:
        rows: [R, D] embedded time and condition; one row per side where all its samples share it.
        index: [S B] the row of every sample; None where rows fit the batch, or are one.
        rotation: turns queries and keys.
        sides: S conditions.
    """

    rows: Tensor
    index: Tensor | None
    rotation: nn.Module
    sides: Sequence[Side]

    def vectors(self, modulation: Modulation) -> tuple[Tensor, ...]:
        """Return shifts, scales and gates, each [S B or 1, 1, D], computed once per row."""
        made = modulation(self.rows)
        made = made if self.index is None else made[self.index]
        return made[:, None].chunk(modulation.count, dim=-1)


class DiTBlock(Block):
    """x += gate attn(mod(norm x)); x += cross(x) with text; x += gate mlp(mod(norm x))."""

    ENTRIES = ("read",)

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.vectors = 4 if config.wo_shift else 6
        self.norm1 = norm(config)
        self.attn = Attention(config)
        self.cross = CrossAttention(config) if config.text_width else None
        self.norm2 = norm(config)
        self.mlp = SwiGLU(config) if config.use_swiglu else Perceptron(config)
        self.adaLN_modulation = Modulation(config.hidden_size, self.vectors)

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a caption's tokens [R, L, text_width], as `CrossAttention.prepare`."""
        assert self.cross is not None
        return self.cross.prepare(tokens)

    def forward(self, x: Tensor, given: Given, number: int) -> Tensor:
        """x: [S B, N, D], one part per side -> [S B, N, D]; number is this block's."""
        vectors = given.vectors(self.adaLN_modulation)
        shift1 = shift2 = None
        if self.vectors == 4:
            scale1, gate1, scale2, gate2 = vectors
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        seen = self.attn(modulate(self.norm1, x, shift1, scale1), given.rotation)
        x = torch.addcmul(x, gate1, seen)
        if self.cross is not None:
            x = x + self.cross(x, given.sides, number)
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2, x, shift2, scale2)))


class FinalLayer(nn.Module):
    """Norm, modulation and the linear map of every token to its patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.norm_final = norm(config)
        self.linear = linear(config.hidden_size, config.patch_size**2 * channels, std=0.0)
        self.adaLN_modulation = Modulation(config.hidden_size, 2)

    def forward(self, x: Tensor, given: Given) -> Tensor:
        """x: [S B, N, D] -> [S B, N, p p C]."""
        shift, scale = given.vectors(self.adaLN_modulation)
        return self.linear(modulate(self.norm_final, x, shift, scale))


class DiT(nn.Module):
    """LightningDiT (hustvl/LightningDiT: models/lightningdit.py, as in isno0907/ldmae).

    Args:
        config: sizes; with a text_width the network takes captions, without it labels.
    """

    pos_embed: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, side = config.hidden_size, config.input_size // config.patch_size
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(width)
        if config.text_width:
            self.text_norm = RMSNorm(config.text_width)
            self.text_embedder = linear(config.text_width, width, std=0.02)
        else:
            self.y_embedder = LabelEmbedder(config)
        self.register_buffer("pos_embed", sincos_table(width, side))
        turning = config.use_rope
        self.feat_rope = Rotation(width // config.num_heads, side) if turning else nn.Identity()
        self.blocks = nn.ModuleList([DiTBlock(config) for _ in range(config.depth)])
        self.final_layer = FinalLayer(config)
        if config.use_checkpoint:
            recompute_blocks(self)

    def label_side(self, labels: Tensor) -> Side:
        """Prepare labels [R] int64; num_classes is the null label."""
        return Side(self.y_embedder(labels))

    def text_side(self, tokens: Tensor, mask: Tensor | None = None) -> Side:
        """Prepare captions: keys and values of every block, and the mean token for the time.

        Args:
            tokens: [R, L, text_width] of the text encoder.
            mask: [R, L] bool, True where a token is real; None where all are.
        """
        tokens = self.text_norm(tokens)
        real = torch.ones_like(tokens[..., :1]) if mask is None else mask[..., None].to(tokens)
        mean = (tokens * real).sum(1) / real.sum(1)
        text = [b.read(tokens) for b in self.blocks if isinstance(b, DiTBlock)]
        return Side(self.text_embedder(mean), text, None if mask is None else mask[:, None, None])

    def forward(self, x: Tensor, t: Tensor, sides: Sequence[Side]) -> Tensor:
        """Predict the velocity (or the noise) under every condition, as one batch.

        Args:
            x: [B, C, H, W] latents.
            t: [B] times, or [1] where all samples share it; on the device of x.
            sides: S conditions.

        Returns:
            [S, B, C, H, W].
        """
        batch, count = x.shape[0], len(sides)
        time = self.t_embedder(t)  # [B or 1, D]
        rows = [time + side.vector for side in sides]  # S times [B or 1, D]
        index = None
        if count > 1:
            first = itertools.accumulate([len(r) for r in rows], initial=0)
            own = torch.arange(batch, device=x.device)
            index = torch.cat(
                [f + own % len(r) for f, r in zip(first, rows, strict=False)]
            )  # [S B]: the row of every sample
        given = Given(torch.cat(rows), index, self.feat_rope, sides)
        tokens = (self.x_embedder(x) + self.pos_embed).repeat(count, 1, 1)  # [S B, N, D]
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, given, number)
        out = self.unpatchify(self.final_layer(tokens, given))[:, : self.config.in_channels]
        return out.unflatten(0, (count, batch))

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Put patches together: [B, N, p p C] -> [B, C, H, W]."""
        p, side = self.config.patch_size, self.config.input_size // self.config.patch_size
        patches = tokens.unflatten(2, (p, p, -1)).unflatten(1, (side, side))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

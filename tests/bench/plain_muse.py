"""The plain side of the Muse bench: network and sampling loop laid out as in diffusers.

Channels first with a permutation around every norm and between convolutions and attention, norms
spelled out, text, keys, values, condition and adaptive shifts computed anew in every step, both
sides of the guidance as one doubled batch, the table applied to every token, softmax over all
codes, torch.multinomial over all tokens, visible ones overwritten afterwards.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.muse.config import UViTConfig


class RootNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(variance + self.eps) * self.weight


class CentredNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, None, self.eps)


class AdaptiveNorm(nn.Module):
    def __init__(self, width: int, norm: nn.Module):
        super().__init__()
        self.linear = nn.Linear(width, 2 * width, bias=False)
        self.norm = norm

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(cond)).chunk(2, dim=1)
        return self.norm(x) * (1 + scale)[:, None, :] + shift[:, None, :]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False), nn.Dropout(0.0)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        batch, _, width = x.shape
        q, k, v = (
            t.view(batch, -1, self.heads, width // self.heads).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        out = out.transpose(1, 2).reshape(batch, -1, width)
        return self.to_out[1](self.to_out[0](out))


class Gated(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.net = nn.ModuleList(
            [Gated(width, inner), nn.Dropout(0.0), nn.Linear(inner, width, bias=False)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net:
            x = module(x)
        return x


class Layer(nn.Module):
    def __init__(self, c: UViTConfig):
        super().__init__()
        width, eps = c.hidden_size, c.layer_norm_eps
        self.norm1 = AdaptiveNorm(width, RootNorm(width, eps))
        self.attn1 = Attention(width, c.num_attention_heads)
        self.norm2 = AdaptiveNorm(width, RootNorm(width, eps))
        self.attn2 = Attention(width, c.num_attention_heads)
        self.norm3 = AdaptiveNorm(width, CentredNorm(width, eps))
        self.ff = FeedForward(width, c.intermediate_size)

    def forward(self, x: Tensor, text: Tensor, cond: Tensor) -> Tensor:
        x = self.attn1(self.norm1(x, cond)) + x
        x = self.attn2(self.norm2(x, cond), text) + x
        return self.ff(self.norm3(x, cond)) + x


class ResponseNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        energy = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        ratio = energy / (energy.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * ratio) + self.beta + x


class ResBlock(nn.Module):
    def __init__(self, c: UViTConfig):
        super().__init__()
        width = c.block_out_channels
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = RootNorm(width, c.layer_norm_eps)
        self.channelwise_linear_1 = nn.Linear(width, 4 * width, bias=False)
        self.channelwise_norm = ResponseNorm(4 * width)
        self.channelwise_linear_2 = nn.Linear(4 * width, width, bias=False)
        self.cond_embeds_mapper = nn.Linear(c.hidden_size, 2 * width, bias=False)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.channelwise_norm(F.gelu(self.channelwise_linear_1(y)))
        x = self.channelwise_linear_2(y).permute(0, 3, 1, 2) + x
        scale, shift = self.cond_embeds_mapper(F.silu(cond)).chunk(2, dim=1)
        return x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


class TextBlock(nn.Module):
    def __init__(self, c: UViTConfig):
        super().__init__()
        width = c.block_out_channels
        if c.hidden_size != width:
            self.kv_mapper = nn.Linear(c.hidden_size, width, bias=False)
        self.norm1, self.norm2 = RootNorm(width, 1e-6), RootNorm(width, 1e-6)
        self.attn1 = Attention(width, c.block_num_heads)
        self.attn2 = Attention(width, c.block_num_heads)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        if hasattr(self, "kv_mapper"):
            text = self.kv_mapper(F.silu(text))
        x = self.attn1(self.norm1(x), text) + x
        return self.attn2(self.norm2(x), text) + x


class Side(nn.Module):
    def __init__(self, c: UViTConfig):
        super().__init__()
        self.res_blocks = nn.ModuleList(ResBlock(c) for _ in range(c.num_res_blocks))
        self.attention_blocks = nn.ModuleList(TextBlock(c) for _ in range(c.num_res_blocks))

    def forward(self, x: Tensor, text: Tensor, cond: Tensor) -> Tensor:
        for res_block, attention_block in zip(self.res_blocks, self.attention_blocks, strict=True):
            x = res_block(x, cond)
            batch, channels, h, w = x.shape
            tokens = x.view(batch, channels, h * w).permute(0, 2, 1)
            tokens = attention_block(tokens, text)
            x = tokens.permute(0, 2, 1).view(batch, channels, h, w)
        return x


class Embed(nn.Module):
    def __init__(self, c: UViTConfig):
        super().__init__()
        self.embeddings = nn.Embedding(c.vocab_size, c.in_channels)
        self.layer_norm = RootNorm(c.in_channels, c.layer_norm_eps)
        self.conv = nn.Conv2d(c.in_channels, c.block_out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.layer_norm(self.embeddings(x)).permute(0, 3, 1, 2))


class CondEmbed(nn.Module):
    def __init__(self, c: UViTConfig):
        super().__init__()
        given = c.cond_embed_dim + c.micro_cond_embed_dim
        self.linear_1 = nn.Linear(given, c.hidden_size, bias=False)
        self.linear_2 = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Head(nn.Module):
    def __init__(self, c: UViTConfig):
        super().__init__()
        self.conv1 = nn.Conv2d(c.block_out_channels, c.in_channels, 1, bias=False)
        self.layer_norm = RootNorm(c.in_channels, c.layer_norm_eps)
        self.conv2 = nn.Conv2d(c.in_channels, c.codebook_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_norm(self.conv1(x).permute(0, 2, 3, 1))
        return self.conv2(x.permute(0, 3, 1, 2))


class PlainUViT(nn.Module):
    def __init__(self, c: UViTConfig):
        super().__init__()
        self.config = c
        width, eps = c.hidden_size, c.layer_norm_eps
        self.encoder_proj = nn.Linear(c.encoder_hidden_size, width, bias=False)
        self.encoder_proj_layer_norm = RootNorm(width, eps)
        self.embed = Embed(c)
        self.cond_embed = CondEmbed(c)
        self.down_block = Side(c)
        self.project_to_hidden_norm = RootNorm(c.block_out_channels, eps)
        self.project_to_hidden = nn.Linear(c.block_out_channels, width, bias=False)
        self.transformer_layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.project_from_hidden_norm = RootNorm(width, eps)
        self.project_from_hidden = nn.Linear(width, c.block_out_channels, bias=False)
        self.up_block = Side(c)
        self.mlm_layer = Head(c)

    def micro(self, values: Tensor) -> Tensor:
        half = self.config.micro_cond_encode_dim // 2
        rates = torch.arange(half).float().mul(-math.log(10000) / half).exp()
        angles = values.flatten()[:, None].float() * rates[None]
        return torch.cat([angles.cos(), angles.sin()], dim=-1).reshape(len(values), -1)

    def forward(self, x: Tensor, text: Tensor, pooled: Tensor, micro: Tensor) -> Tensor:
        text = self.encoder_proj_layer_norm(self.encoder_proj(text))
        cond = self.cond_embed(torch.cat([pooled, self.micro(micro).to(pooled.dtype)], dim=1))
        y = self.down_block(self.embed(x), text, cond)
        batch, channels, h, w = y.shape
        y = y.permute(0, 2, 3, 1).reshape(batch, h * w, channels)
        y = self.project_to_hidden(self.project_to_hidden_norm(y))
        for layer in self.transformer_layers:
            y = layer(y, text, cond)
        y = self.project_from_hidden(self.project_from_hidden_norm(y))
        y = y.reshape(batch, h, w, channels).permute(0, 3, 1, 2)
        return self.mlm_layer(self.up_block(y, text, cond))


def multinomial(probs: Tensor, step: int) -> Tensor:
    """Released draw: probabilities [n, K] -> [n]."""
    return torch.multinomial(probs, 1)[:, 0]


def scheduler_step(
    logits: Tensor,
    sample: Tensor,
    step: int,
    steps: int,
    temperature: float,
    draw: Callable[[Tensor, int], Tensor],
    noise: Tensor | None,
    mask_id: int,
) -> Tensor:
    """Draw every token, score it, mask the least sure again: logits [B, K, h, w]."""
    batch, codes, h, w = logits.shape
    sample = sample.reshape(batch, h * w)
    logits = logits.reshape(batch, codes, h * w).permute(0, 2, 1)
    unknown = sample == mask_id
    probs = logits.softmax(dim=-1)
    flat = probs.reshape(-1, codes)
    drawn = draw(flat, step).view(batch, h * w)
    drawn = torch.where(unknown, drawn, sample)
    if step == steps - 1:
        return drawn.reshape(batch, h, w)
    ratio = torch.tensor((step + 1) / steps)
    number = (h * w * torch.cos(ratio * math.pi / 2)).floor()
    number = torch.min(unknown.sum(dim=-1, keepdim=True) - 1, number)
    number = torch.max(torch.tensor([1]), number)
    chosen = torch.gather(probs, -1, drawn[:, :, None])[:, :, 0]
    chosen = torch.where(unknown, chosen, torch.finfo(chosen.dtype).max)
    if noise is None:
        noise = -torch.log((-torch.log(torch.rand_like(chosen).clamp(1e-20))).clamp(1e-20))
    confidence = torch.log(chosen.clamp(1e-20)) + temperature * noise
    ordered = confidence.sort(dim=-1).values
    cutoff = torch.gather(ordered, 1, number.long())
    return torch.where(confidence < cutoff, mask_id, drawn).reshape(batch, h, w)


def plain_sample(
    model: PlainUViT,
    inputs: dict[str, Tensor],
    null_inputs: dict[str, Tensor],
    start: Tensor,
    *,
    steps: int,
    guidance: float,
    temperature: tuple[float, float],
    draw: Callable[[Tensor, int], Tensor] = multinomial,
    noise: Tensor | None = None,
    timer: Callable[[str], None] = lambda part: None,
) -> Tensor:
    """One doubled pass per step, then guidance and the scheduler's step."""
    both = {k: torch.cat([null_inputs[k], inputs[k]]) for k in inputs}
    mask_id, x = model.config.vocab_size - 1, start
    temperatures = torch.linspace(*temperature, steps)
    for i in range(steps):
        logits = model(torch.cat([x, x]), **both)
        timer("network")
        uncond, cond = logits.chunk(2)
        logits = uncond + guidance * (cond - uncond)
        x = scheduler_step(
            logits,
            x,
            i,
            steps,
            float(temperatures[i]),
            draw,
            None if noise is None else noise[i],
            mask_id,
        )
        timer("sampler")
    return x

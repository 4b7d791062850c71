"""The plain side of the VQ-Diffusion bench: network and loop laid out as the released code.

Attention is written out and its weights are averaged over heads, AdaLN and the text's keys and
values are computed anew in each of two forward passes per step, tokens travel as logarithms of
one-hot vectors [B, K + 1, N], start prediction, truncation and posterior are made for every class
of every position, and a Gumbel argmax over all of them draws. The strides are the exact ones.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.vq_diffusion.config import ModelConfig

FLOOR = -70.0


class AdaNorm(nn.Module):
    def __init__(self, width: int, steps: int):
        super().__init__()
        self.emb = nn.Embedding(steps, width)
        self.linear = nn.Linear(width, width * 2)
        self.layernorm = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        both = self.linear(F.silu(self.emb(t))).unsqueeze(1)
        scale, shift = torch.chunk(both, 2, dim=2)
        return self.layernorm(x) * (1 + scale) + shift


class WrittenOutAttention(nn.Module):
    def __init__(self, width: int, source: int, heads: int):
        super().__init__()
        self.heads = heads
        self.key = nn.Linear(source, width)
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(source, width)
        self.proj = nn.Linear(width, width)
        self.attn_drop = nn.Dropout(0.0)
        self.resid_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        b, n, c = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(b, y.size(1), self.heads, c // self.heads).transpose(1, 2)

        k, q, v = split(self.key(source)), split(self.query(x)), split(self.value(source))
        weights = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        weights = self.attn_drop(F.softmax(weights, dim=-1))
        y = (weights @ v).transpose(1, 2).contiguous().view(b, n, c)
        return self.resid_drop(self.proj(y)), weights.mean(dim=1)


class GridMLP(nn.Module):
    def __init__(self, width: int, times: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, times * width, 3, 1, 1)
        self.conv2 = nn.Conv2d(times * width, width, 3, 1, 1)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        side = math.isqrt(n)
        y = x.transpose(1, 2).reshape(b, c, side, side).contiguous()
        y = self.conv1(y)
        y = self.conv2(y * torch.sigmoid(1.702 * y))
        return self.dropout(y.reshape(b, c, n).transpose(1, 2).contiguous())


class PlainBlock(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.ln1 = AdaNorm(c.n_embd, c.diffusion_steps)
        self.ln1_1 = AdaNorm(c.n_embd, c.diffusion_steps)
        self.ln2 = nn.LayerNorm(c.n_embd)
        self.attn1 = WrittenOutAttention(c.n_embd, c.n_embd, c.n_head)
        self.attn2 = WrittenOutAttention(c.n_embd, c.condition_dim, c.n_head)
        self.mlp = GridMLP(c.n_embd, c.mlp_hidden_times)

    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        y = self.ln1(x, t)
        x = x + self.attn1(y, y)[0]
        out, weights = self.attn2(self.ln1_1(x, t), text)
        x = x + out
        return x + self.mlp(self.ln2(x)), weights


class PlainEmbedding(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.emb = nn.Embedding(c.num_codes + 1, c.n_embd)
        self.height_emb = nn.Embedding(c.spatial_size[0], c.n_embd)
        self.width_emb = nn.Embedding(c.spatial_size[1], c.n_embd)

    def forward(self, index: Tensor) -> Tensor:
        height, width = self.height_emb.weight, self.width_emb.weight
        places = (height.unsqueeze(1) + width.unsqueeze(0)).flatten(0, 1).unsqueeze(0)
        return self.emb(index) + places[:, : index.size(1)]


class PlainDenoiser(nn.Module):
    """A text model with conv_mlp; parameter names are the released ones."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.content_emb = PlainEmbedding(config)
        self.blocks = nn.ModuleList([PlainBlock(config) for _ in range(config.n_layer)])
        self.to_logits = nn.Sequential(
            nn.LayerNorm(config.n_embd), nn.Linear(config.n_embd, config.num_codes)
        )

    def forward(self, index: Tensor, text: Tensor, t: Tensor) -> Tensor:
        """[B, N] int64, [B, L, condition_dim], [B] int64 -> logits [B, K, N]."""
        x = self.content_emb(index)
        for block in self.blocks:
            x, _ = block(x, text, t)
        return self.to_logits(x).transpose(1, 2)


def log_one_hot(index: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """[B, N] -> [B, classes, N], log(1) and log(1e-30)."""
    hot = F.one_hot(index, classes).permute(0, 2, 1)
    return hot.to(dtype).clamp(min=1e-30).log()


def log_add_exp(a: Tensor, b: Tensor) -> Tensor:
    high = torch.max(a, b)
    return high + torch.log(torch.exp(a - high) + torch.exp(b - high))


def predict_start(logits: Tensor) -> Tensor:
    """Logits [B, K, N] -> log p(x_0 | x_t) [B, K + 1, N]; the mask has -70."""
    log_p = F.log_softmax(logits.double(), dim=1).to(logits.dtype)
    floor = torch.full_like(log_p[:, :1], FLOOR)
    return torch.clamp(torch.cat([log_p, floor], dim=1), FLOOR, 0)


def guide(log_c: Tensor, log_u: Tensor, scale: float) -> Tensor:
    log_c, log_u = log_c[:, :-1], log_u[:, :-1]
    mixed = log_u + scale * (log_c - log_u)
    mixed = mixed - torch.logsumexp(mixed, dim=1, keepdim=True)
    mixed = mixed.clamp(FLOOR, 0)
    return torch.cat([mixed, torch.full_like(mixed[:, :1], FLOOR)], dim=1)


def truncate(log_p: Tensor, rate: float) -> Tensor:
    ordered, indices = torch.sort(log_p, 1, descending=True)
    below = torch.exp(ordered).cumsum(dim=1) < rate
    below = torch.cat([torch.full_like(below[:, :1], True), below], dim=1)[:, :-1]
    kept = below.gather(1, indices.argsort(1)).to(log_p.dtype)
    return kept * log_p + (1 - kept) * FLOOR


def cumulative(t: int, steps: int, codes: int) -> tuple[float, float, float]:
    """A, B and C of the released schedule; t = -1 is clean."""
    if t < 0:
        return 1.0, 0.0, 0.0
    share = t / (steps - 1)
    a = 0.99999 + share * (0.000009 - 0.99999)
    c = 0.000009 + share * (0.99999 - 0.000009)
    return a, (1 - a - c) / codes, c


def log_transition(log_x: Tensor, a: float, b: float, c: float) -> Tensor:
    """log q of the next token for log_x [B, K + 1, N]."""
    log_a, log_b, log_c, log_1_c = (
        torch.tensor(v, dtype=torch.float64).log().to(log_x.dtype) for v in (a, b, c, 1 - c)
    )
    codes = log_add_exp(log_x[:, :-1] + log_a, log_b)
    return torch.cat([codes, log_add_exp(log_x[:, -1:] + log_1_c, log_c)], dim=1)


def posterior(log_start: Tensor, log_x: Tensor, t: int, s: int, steps: int) -> Tensor:
    """log p(x_s | x_t) [B, K + 1, N] from log p(x_0 | x_t) and the log one-hot of x_t."""
    codes = log_x.size(1) - 1
    now, before = cumulative(t, steps, codes), cumulative(s, steps, codes)
    a, c = now[0] / before[0], 1 - (1 - now[2]) / (1 - before[2])
    stride = (a, (1 - a - c) / codes, c)
    log_x = log_one_hot(log_x.argmax(1), codes + 1, log_x.dtype)
    masked = (log_x.argmax(1) == codes).unsqueeze(1)
    floor = torch.full_like(log_x[:, :1], FLOOR)

    log_total = log_transition(log_x, *now)[:, :-1]
    log_total = torch.where(masked, torch.full_like(log_total, math.log(now[2])), log_total)
    log_one = torch.cat([log_transition(log_x, *stride)[:, :-1], floor], dim=1)
    closed = torch.cat([torch.full_like(log_total, math.log(c)), torch.zeros_like(floor)], dim=1)
    log_one = torch.where(masked, closed, log_one)

    q = torch.cat([log_start[:, :-1] - log_total, floor], dim=1)
    total = torch.logsumexp(q, dim=1, keepdim=True)
    q = log_transition(q - total, *before)
    return torch.clamp(q + log_one + total, FLOOR, 0)


def gumbel_argmax(log_law: Tensor, log_start: Tensor, log_x: Tensor) -> Tensor:
    """Released draw: log law [B, K + 1, N] -> [B, N]."""
    uniform = torch.rand_like(log_law)
    noise = -torch.log(-torch.log(uniform + 1e-30) + 1e-30)
    return (noise + log_law).argmax(dim=1)


def plain_step(
    log_c: Tensor,
    log_u: Tensor,
    log_x: Tensor,
    times: tuple[int, int, int],
    scale: float,
    rate: float,
    draw: Callable[..., Tensor],
) -> Tensor:
    """Everything of a step but the network: logits [B, K, N] of both sides -> next log one-hot."""
    log_start = guide(predict_start(log_c), predict_start(log_u), scale)
    log_start = truncate(log_start, rate)
    log_law = posterior(log_start, log_x, *times)
    return log_one_hot(draw(log_law, log_start, log_x), log_x.size(1), log_x.dtype)


def plain_sample(
    model: PlainDenoiser,
    text: Tensor,
    null: Tensor,
    borders: list[int],
    *,
    guidance: float,
    truncation: float,
    draw: Callable[..., Tensor] = gumbel_argmax,
    step: Callable[..., Tensor] = plain_step,
) -> Tensor:
    """Sample [B, N] tokens; borders are the times from T - 1 to -1."""
    c = model.config
    places = c.spatial_size[0] * c.spatial_size[1]
    index = torch.full((text.size(0), places), c.num_codes)
    log_x = F.one_hot(index, c.num_codes + 1).permute(0, 2, 1).to(text.dtype).log()
    for t, s in pairwise(borders):
        time = torch.full((text.size(0),), t, dtype=torch.long)
        log_c = model(log_x.argmax(1), text, time)
        log_u = model(log_x.argmax(1), null, time)
        times = (t, s, c.diffusion_steps)
        log_x = step(log_c, log_u, log_x, times, guidance, truncation, draw)
    return log_x.argmax(1)

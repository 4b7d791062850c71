"""The plain side of the Paella bench: network and sampling loop laid out as the released code.

Channels first with a permutation around every LayerNorm, nn.MultiheadAttention over the
concatenated sequence, everything of the condition and of t computed anew in each of two forward
passes per step, the table applied to every token, softmax over dim 1, torch.multinomial.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_modules.paella.config import ModelConfig


class ChannelNorm(nn.LayerNorm):
    def __init__(self, width: int):
        super().__init__(width, elementwise_affine=False, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResponseNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        energy = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        ratio = energy / (energy.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * ratio) + self.beta + x


class Conv(nn.Module):
    def __init__(self, width: int, skip: int, config: ModelConfig):
        super().__init__()
        k = config.kernel_size
        self.depthwise = nn.Conv2d(width + skip, width, k, padding=k // 2, groups=width)
        self.norm = ChannelNorm(width)
        self.channelwise = nn.Sequential(
            nn.Linear(width, width * 4),
            nn.GELU(),
            ResponseNorm(width * 4),
            nn.Dropout(config.dropout),
            nn.Linear(width * 4, width),
        )

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = x if skip is None else torch.cat([x, skip], dim=1)
        y = self.norm(self.depthwise(y)).permute(0, 2, 3, 1)
        return x + self.channelwise(y).permute(0, 3, 1, 2)


class Attend(nn.Module):
    def __init__(self, width: int, heads: int, config: ModelConfig):
        super().__init__()
        self.norm = ChannelNorm(width)
        self.attention = nn.ModuleDict(
            {"attn": nn.MultiheadAttention(width, heads, config.dropout, batch_first=True)}
        )
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(config.c_cond, width))

    def forward(self, x: Tensor, sequence: Tensor) -> Tensor:
        y = self.norm(x)
        queries = y.view(y.size(0), y.size(1), -1).permute(0, 2, 1)
        keys = torch.cat([queries, self.kv_mapper(sequence)], dim=1)
        out = self.attention["attn"](queries, keys, keys, need_weights=False)[0]
        return x + out.permute(0, 2, 1).view(*x.shape)


class Time(nn.Module):
    def __init__(self, width: int, config: ModelConfig):
        super().__init__()
        self.mapper = nn.Linear(config.c_r, 2 * width)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        a, b = self.mapper(r)[:, :, None, None].chunk(2, dim=1)
        return x * (1 + a) + b


class PlainPaella(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        c, last = config, len(config.c_hidden) - 1
        self.byt5_mapper = nn.Linear(c.byt5_embd, c.c_cond)
        self.clip_mapper = nn.Linear(c.clip_embd, c.c_cond * c.clip_seq_len)
        self.clip_image_mapper = nn.Linear(c.clip_embd, c.c_cond * c.clip_seq_len)
        self.seq_norm = nn.LayerNorm(c.c_cond, elementwise_affine=False, eps=1e-6)
        table_norm = nn.LayerNorm(c.c_in, elementwise_affine=False, eps=1e-6)
        self.in_mapper = nn.Sequential(nn.Embedding(c.num_labels, c.c_in), table_norm)
        patch = c.patch_size**2
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(c.patch_size),
            nn.Conv2d(c.c_in * patch, c.c_hidden[0], 1),
            ChannelNorm(c.c_hidden[0]),
        )
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i in range(last + 1):
            blocks = self.blocks(i, 0)
            if i > 0:
                shrink = nn.Conv2d(c.c_hidden[i - 1], c.c_hidden[i], 2, stride=2)
                blocks.insert(0, nn.Sequential(ChannelNorm(c.c_hidden[i - 1]), shrink))
            self.down_blocks.append(nn.ModuleList(blocks))
        for i in reversed(range(last + 1)):
            blocks = self.blocks(i, c.c_hidden[i] if i < last else 0)
            if i > 0:
                grow = nn.ConvTranspose2d(c.c_hidden[i], c.c_hidden[i - 1], 2, stride=2)
                blocks.append(nn.Sequential(ChannelNorm(c.c_hidden[i]), grow))
            self.up_blocks.append(nn.ModuleList(blocks))
        self.clf = nn.Sequential(
            ChannelNorm(c.c_hidden[0]),
            nn.Conv2d(c.c_hidden[0], c.c_out * patch, 1),
            nn.PixelShuffle(c.patch_size),
        )
        self.out_mapper = nn.Sequential(
            ChannelNorm(c.c_out), nn.Conv2d(c.c_out, c.num_labels, 1, bias=False)
        )

    def blocks(self, level: int, skip: int) -> list[nn.Module]:
        c = self.config
        width, made = c.c_hidden[level], []
        for kind in c.level_config[level] * c.blocks[level]:
            if kind == "C":
                made.append(Conv(width, 0 if made else skip, c))
            elif kind == "T":
                made.append(Time(width, c))
            else:
                made.append(Attend(width, c.nhead[level], c))
        return made

    def embed_time(self, t: Tensor) -> Tensor:
        half = self.config.c_r // 2
        rates = torch.arange(half, device=t.device).float()
        rates = rates.mul(-math.log(10000) / (half - 1)).exp()
        angles = (t * 10000)[:, None] * rates[None, :]
        return torch.cat([angles.sin(), angles.cos()], dim=1).to(self.byt5_mapper.weight.dtype)

    def embed_condition(self, byt5: Tensor, clip: Tensor | None, image: Tensor | None) -> Tensor:
        sequence = self.byt5_mapper(byt5)
        for mapper, part in ((self.clip_mapper, clip), (self.clip_image_mapper, image)):
            if part is not None:
                tokens = mapper(part).view(part.size(0), -1, self.config.c_cond)
                sequence = torch.cat([sequence, tokens], dim=1)
        return self.seq_norm(sequence)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        byt5: Tensor,
        clip: Tensor | None = None,
        clip_image: Tensor | None = None,
    ) -> Tensor:
        r = self.embed_time(t)
        sequence = self.embed_condition(byt5, clip, clip_image)
        x = self.embedding(self.in_mapper(x).permute(0, 3, 1, 2))
        outputs: list[Tensor] = []
        for level in self.down_blocks:
            for block in level:
                x = self.apply_block(block, x, r, sequence)
            outputs.insert(0, x)
        for i, level in enumerate(self.up_blocks):
            for j, block in enumerate(level):
                skip = outputs[i] if i > 0 and j == 0 else None
                x = self.apply_block(block, x, r, sequence, skip)
        return self.out_mapper(self.clf(x))

    def apply_block(
        self, block: nn.Module, x: Tensor, r: Tensor, sequence: Tensor, skip: Tensor | None = None
    ) -> Tensor:
        if isinstance(block, Conv):
            return block(x, skip)
        if isinstance(block, Attend):
            return block(x, sequence)
        return block(x, r) if isinstance(block, Time) else block(x)


def multinomial(scores: Tensor, step: int) -> Tensor:
    """Released draw: scores [n, K] -> [n]."""
    return torch.multinomial(scores, 1)[:, 0]


def plain_sample(
    model: PlainPaella,
    inputs: dict[str, Tensor],
    null_inputs: dict[str, Tensor],
    init_noise: Tensor,
    uniform_renoise: Tensor | None,
    *,
    steps: int,
    temperature: tuple[float, float],
    guidance: tuple[float, float],
    draw: Callable[[Tensor, int], Tensor] = multinomial,
) -> Tensor:
    """Two forwards, divide, softmax over dim 1, draw, renoise with the initial tokens."""
    x, batch = init_noise.clone(), init_noise.size(0)
    times = torch.linspace(1.0, 0.0, steps + 1)
    temperatures = torch.linspace(*temperature, steps)
    weights = torch.linspace(*guidance, steps)
    for i in range(steps):
        t = torch.ones(batch) * times[i]
        logits = model(x, t, **inputs)
        logits = logits * weights[i] + model(x, t, **null_inputs) * (1 - weights[i])
        scores = logits.div(temperatures[i]).softmax(dim=1)
        rows = scores.permute(0, 2, 3, 1).reshape(-1, logits.size(1))
        x = draw(rows, i).view(batch, *logits.shape[2:])
        if i < steps - 1:
            u = torch.rand_like(x.float()) if uniform_renoise is None else uniform_renoise[i]
            mask = (u <= times[i + 1]).long()
            x = x * (1 - mask) + init_noise * mask
    return x

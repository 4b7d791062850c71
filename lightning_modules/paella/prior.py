"""Diffusion prior: from the embedding of a text to the embedding of an image (prior_v1.pt).

Sources: pabloppp/Arroz-Con-Cosas (network, training), pabloppp/pytorch-tools (second time grid).
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_modules.paella.config import PriorConfig
from lightning_modules.paella.network import timestep_embedding


class Prior(nn.Module):
    """Residual perceptron that predicts the noise in an image embedding.

    Args:
        config: sizes; the default is the released checkpoint (899,770,624 parameters).
    """

    def __init__(self, config: PriorConfig):
        super().__init__()
        self.config = config
        c = config
        self.blocks = nn.ModuleList([nn.Linear(c.clip_embd, c.c_hidden)])
        for _ in range(c.num_blocks):
            widen = nn.Linear(c.clip_embd + c.c_hidden + c.c_r, 4 * c.c_hidden, bias=False)
            widen.weight.data.mul_(math.sqrt(1 / c.num_blocks))
            self.blocks.append(
                nn.Sequential(
                    widen,
                    nn.LayerNorm(4 * c.c_hidden),
                    nn.GELU(),
                    nn.Linear(4 * c.c_hidden, c.c_hidden, bias=False),
                    nn.LayerNorm(c.c_hidden),
                )
            )
        self.blocks.append(nn.Linear(c.c_hidden, c.clip_embd))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Predicted noise [B, clip_embd] of noised embeddings x at times t [B], 1 = full noise.

        Zeros are the null condition in place of a text embedding [B, clip_embd].
        """
        first, *blocks, last = self.blocks
        beside = torch.cat([text, timestep_embedding(t, self.config.c_r).to(text.dtype)], dim=1)
        x = first(x)
        for block in blocks:
            x = x + block(torch.cat([x, beside], dim=1))
        return last(x)


def alpha_bar(t: Tensor, s: float = 0.008) -> Tensor:
    """Cosine schedule (arXiv 2102.09672, equation 17) of t in [0, 1], clamped to [1e-4, 0.9999]."""
    level = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
    return (level / math.cos(s / (1 + s) * math.pi / 2) ** 2).clamp(1e-4, 0.9999)


def diffuse(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """sqrt(a) x + sqrt(1 - a) noise, a = alpha_bar(t); x, noise: [B, C], t: [B]."""
    a = alpha_bar(t)[:, None]
    return a.sqrt() * x + (1 - a).sqrt() * noise


def time_grid(steps: int, grid: Literal["arroz", "torchtools"]) -> Tensor:
    """Times from noise to image, [steps + 1].

    arroz: linspace(1, 0, steps + 2) without its first entry (t = 1 is skipped);
    torchtools: linspace(1, 0, steps + 1).
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if grid == "arroz":
        return torch.linspace(1, 0, steps + 2)[1:]
    return torch.linspace(1, 0, steps + 1)


def sample(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    text: Tensor,
    *,
    init: Tensor,
    step_noise: Tensor | None,
    times: Tensor,
    guidance: float = 3.0,
    sampler: Literal["ddpm", "ddim"] = "ddpm",
    null: Tensor | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Image embedding [B, C] of a text embedding [B, C].

    Args:
        predict: (x [B, C], t [B], text [B, C]) -> noise [B, C], a `Prior`.
        text: [B, C].
        init: [B, C] normal noise.
        step_noise: [steps, B, C] normal noise, which DDPM needs.
        times: [steps + 1] from `time_grid`.
        guidance: lerp(null, text, guidance) of the predicted noises; 1 is none.
        sampler: ddpm (ancestral) or ddim (deterministic).
        null: [B, C] null condition; zeros if None.
        on_step: called with the step's number and its result.
    """
    if sampler == "ddpm" and step_noise is None:
        raise ValueError("sampler ddpm needs step_noise")
    null = torch.zeros_like(text) if null is None else null
    x = init
    for i in range(len(times) - 1):
        t, following = times[i].to(x), times[i + 1].to(x)
        now = t.expand(x.shape[0])
        noise = predict(x, now, text)
        if guidance != 1:
            noise = torch.lerp(predict(x, now, null), noise, guidance)
        a, a_next = alpha_bar(t), alpha_bar(following)
        if sampler == "ddim":
            clean = (x - (1 - a).sqrt() * noise) / a.sqrt()
            x = a_next.sqrt() * clean + (1 - a_next).sqrt() * noise
        else:
            step = a / a_next
            x = (x - (1 - step) * noise / (1 - a).sqrt()) / step.sqrt()
            if step_noise is not None and following > 0:
                x = x + ((1 - step) * (1 - a_next) / (1 - a)).sqrt() * step_noise[i]
        if on_step is not None:
            on_step(i, x)
    return x

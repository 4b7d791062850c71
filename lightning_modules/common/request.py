"""What is asked of a generator."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.common.seeding import mix_seed

OnStep = Callable[[int, Tensor, Tensor], None]
"""Called with the step, what went into it and what came out (tokens or latents of B pictures)."""

OnCall = Callable[[Tensor, Tensor | None, Tensor], None]
"""Called with the pictures [n] that a network call was for, the places [n, h, w] bool that it was
asked about (None: another kind of call), and the features [places.sum(), C] before the head."""


@dataclass(frozen=True)
class Request:
    """B pictures that a generator shall draw; picture i has prompt i and seed i.

    Every field besides prompts and seeds is an ability that a paper may lack
    (`GeneratorModule.ABILITIES`). In `sample` start holds images [B, 3, H, W] in [-1, 1], in
    `sample_tokens` their tokens or latents.
    """

    prompts: Sequence[str]
    """B captions."""
    seeds: Sequence[int]
    """B seeds."""
    labels: Sequence[int] | None = None
    """B classes in place of the prompts."""
    negative: Sequence[str] | None = None
    """B captions that guidance leads away from, in place of the null condition."""
    blend_with: Sequence[str] | None = None
    """B captions to blend into: the features of both are mixed."""
    blend: float = 0.0
    """Weight of `blend_with`, 0 to 1."""
    start: Tensor | None = None
    """[B, h, w] tokens or [B, C, h, w] latents: what stands where mask is 0; without a mask, what
    a variation or a rewriting begins with."""
    mask: Tensor | None = None
    """[B, h, w], 1 = generate, 0 = keep what start has there."""
    rewrite: bool = False
    """Edit start without a mask."""
    low: Tensor | None = None
    """[B, h, w] tokens of the picture that super-resolution enlarges."""
    image_condition: Tensor | None = None
    """[B, P] pooled image vectors beside the captions."""
    prior: bool = False
    """Draw `image_condition` from the captions by the checkpoint's prior."""
    attention: Tensor | None = None
    """[n] factors of the attention to the last n conditioning tokens."""
    grid: tuple[int, int] | None = None
    """Height and width of the token grid, where it is not the one trained on or start's."""

    def asked(self) -> set[str]:
        """Return the names of the abilities that this request needs."""
        plain = ("prompts", "seeds", "blend")
        fields = [f for f in dataclasses.fields(self) if f.name not in plain]
        return {f.name for f in fields if getattr(self, f.name) is not f.default}

    def grid_or(self, trained: tuple[int, int]) -> tuple[int, int]:
        """Return the token grid: as asked, else start's, else the one trained on."""
        if self.grid is not None or self.start is None:
            return self.grid or trained
        return self.start.shape[-2], self.start.shape[-1]


def seeded_uniforms(seeds: Sequence[int], shape: tuple[int, ...], stream: int) -> Tensor:
    """Draw uniforms [B, *shape] of which row i depends on (seed i, stream) alone, on the CPU."""
    generators = [torch.Generator().manual_seed(mix_seed(seed, stream)) for seed in seeds]
    return torch.stack([torch.rand(shape, generator=g) for g in generators])


def seeded_normals(seeds: Sequence[int], shape: tuple[int, ...], stream: int) -> Tensor:
    """Draw normal numbers [B, *shape] of which row i depends on (seed i, stream) alone."""
    generators = [torch.Generator().manual_seed(mix_seed(seed, stream)) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=g) for g in generators])

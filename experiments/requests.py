"""What a generator is asked for: prompts, a given picture and further conditions as a `Request`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.settings import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.edits import Edit
    from lightning_modules.common.generator import GeneratorModule
    from lightning_modules.common.request import Request

OPTIONS = {
    "negative": "--negative",
    "start": "--image",
    "mask": "--mask",
    "grid": "--size",
    "rewrite": "--edit",
    "blend_with": "--interpolate",
    "image_condition": "--style",
    "prior": "--prior",
    "attention": "--attention",
}


class Task(NamedTuple):
    """One picture to make."""

    prompt: str
    seed: int
    blend: float | None = None


def make_request(
    module: GeneratorModule,
    tasks: Sequence[Task],
    prompts: Sequence[str],
    negative: str | None,
    edit: Edit | None,
    size: tuple[int, int] | None,
    rewrite: bool = False,
) -> Request:
    """Return the request for the pictures of some tasks.

    Raises:
        ConfigError: an option that this checkpoint's paper does not know.
    """
    from lightning_modules.common.request import Request

    count = len(tasks)
    request = Request([t.prompt for t in tasks], [t.seed for t in tasks])
    if negative is not None:
        request = replace(request, negative=[negative] * count)
    if tasks[0].blend is not None:
        request = replace(request, blend_with=[prompts[1]] * count, blend=tasks[0].blend)
    if edit is not None:
        pixels = (edit.pixels.float() / 127.5 - 1).to(module.device)
        start = pixels.expand(count, -1, -1, -1)
        if edit.tokens is not None:
            request = replace(request, start=start, mask=edit.tokens.expand(count, -1, -1))
        elif rewrite:
            request = replace(request, start=start, rewrite=True)
        else:
            request = replace(request, start=start, image_condition=module.image_condition(start))
    elif size is not None:
        unit = module.pixels_per_token
        request = replace(request, grid=(size[1] // unit, size[0] // unit))
    for name in request.asked() - module.ABILITIES:
        raise ConfigError(f"this checkpoint's paper knows no {OPTIONS.get(name, name)}")
    return request


def conditioned(
    module: GeneratorModule,
    request: Request,
    prior: bool,
    style: Tensor | None,
    attention: Sequence[float] | None,
) -> Request:
    """Add what a picture is conditioned on besides its prompt.

    Args:
        module: the generator.
        request: for B pictures.
        prior: draw an image vector from the prompt.
        style: [3, H, W] uint8, a picture of which the image vector is taken.
        attention: factors of the attention to the last conditioning tokens.

    Raises:
        ConfigError: an option that this checkpoint's paper does not know.
    """
    import torch

    more: dict[str, Any] = {"prior": True} if prior else {}
    if style is not None:
        pixels = (style.float() / 127.5 - 1).to(module.device)[None]  # [1, 3, H, W]
        vector = module.image_condition(pixels)
        if vector is None:
            raise ConfigError("this checkpoint sees no image vectors: leave out --style")
        more["image_condition"] = vector.expand(len(request.seeds), -1)
    if attention is not None:
        more["attention"] = torch.tensor(attention, device=module.device)
    for name in more.keys() - module.ABILITIES:
        raise ConfigError(f"this checkpoint's paper knows no {OPTIONS[name]}")
    return replace(request, **more)


def parse_attention(text: str | None) -> list[float] | None:
    """Read the factors of --attention.

    Raises:
        ConfigError: no numbers from 0 up.
    """
    if text is None:
        return None
    try:
        factors = [float(word) for word in text.split(",")]
    except ValueError:
        factors = []
    if not factors or not all(0 <= factor < math.inf for factor in factors):
        raise ConfigError(f"--attention takes numbers from 0 up, e.g. 1,1,0.5, got {text}")
    return factors

"""A given picture and what is to be made of it: in- and outpainting, variations, edits."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data.images import open_image, to_rgb
from experiments.cli import blame
from experiments.report.pictures import to_pixels
from experiments.settings import ConfigError
from lightning_modules.common.generator import GeneratorModule

Margins = tuple[int, int, int, int]
LARGEST = 4096  # pixels of a side: attention over more tokens than that fits no machine


@dataclass
class Edit:
    """A given picture and what is to be made of it."""

    pixels: Tensor
    """[3, H, W] uint8, sides multiples of what the checkpoint needs."""
    mask: Tensor | None = None
    """[H, W] bool, True = generate; None makes variations."""
    tokens: Tensor | None = None
    """The mask on the token grid [h, w]: a token that the mask touches is generated whole."""
    expanded: bool = False
    """Whether the mask is what was added around the picture."""


def read_picture(path: Path) -> Image.Image:
    """Read a JPEG, PNG or WebP as upright RGB.

    Raises:
        ConfigError: no such file, or no readable picture.
    """
    if not path.is_file():
        raise ConfigError(f"there is no picture {path}")
    try:
        return to_rgb(open_image(path.read_bytes()))
    except UnidentifiedImageError as error:  # its message names a buffer
        raise ConfigError(f"{path} is no readable JPEG, PNG or WebP") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(blame(path, error, "is no readable JPEG, PNG or WebP")) from error


def trained_size(module: GeneratorModule) -> tuple[int, int]:
    """Width and height in pixels of the pictures that the generator was trained on."""
    height, width = module.grid
    return width * module.pixels_per_token, height * module.pixels_per_token


def parse_size(module: GeneratorModule, text: str | None) -> tuple[int, int] | None:
    """Read --size as (width, height).

    Raises:
        ConfigError: not two numbers, or no multiples of the unit.
    """
    if text is None:
        return None
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise ConfigError(f"--size must look like 64x32 (width x height), got {text!r}") from None
    unit = module.size_unit
    if width < 1 or height < 1 or width % unit or height % unit:
        near = [max(1, round(side / unit)) * unit for side in (width, height)]
        raise ConfigError(
            f"--size: sides must be multiples of {unit}, got {text} (near: {near[0]}x{near[1]})"
        )
    if max(width, height) > LARGEST:
        raise ConfigError(f"--size: sides must be at most {LARGEST}, got {text}")
    return width, height


def parse_expand(module: GeneratorModule, text: str) -> Margins:
    """Read --expand as the pixels to add on the left, at the top, on the right, at the bottom.

    Raises:
        ConfigError: not four numbers, none above 0, or no multiples of the unit.
    """
    try:
        left, top, right, bottom = (int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--expand must look like 0,0,32,0 (left,top,right,bottom), got {text!r}"
        ) from None
    margins, unit = (left, top, right, bottom), module.size_unit
    if min(margins) < 0 or max(margins) == 0:
        raise ConfigError(f"--expand: no side may shrink and one must grow, got {text}")
    if any(m % unit for m in margins):
        near = ",".join(str(-(-m // unit) * unit) for m in margins)
        raise ConfigError(
            f"--expand: pixels must be multiples of {unit}, got {text} (near: {near})"
        )
    return margins


def make_edit(
    module: GeneratorModule,
    picture: Image.Image,
    mask: Image.Image | None,
    size: tuple[int, int] | None,
    expand: Margins | None = None,
) -> Edit:
    """Bring a picture and its mask to a size that the checkpoint accepts.

    Variations and edits without a mask are made at --size or the trained size: the largest centred
    part of that shape is resized. With a mask, or margins to add, the picture keeps its own size,
    cut at its borders to whole units, unless --size is given; it may be larger than what the
    generator was trained on.

    Raises:
        ConfigError: a mask of another size or without white, or a picture that is too small.
    """
    unit = module.size_unit
    if mask is not None and mask.size != picture.size:
        raise ConfigError(
            f"--mask is {mask.width}x{mask.height} and --image {picture.width}x{picture.height}; "
            "they must be equally large"
        )
    if size is None and mask is None and expand is None:
        size = trained_size(module)
    if size is None:
        size = (picture.width // unit * unit, picture.height // unit * unit)
        if min(size) == 0:
            raise ConfigError(
                f"--image is {picture.width}x{picture.height}, but this checkpoint needs at least "
                f"{unit}x{unit}; give --size to enlarge it"
            )
        cut = size
    else:
        scale = min(picture.width / size[0], picture.height / size[1])
        cut = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    left, top = (picture.width - cut[0]) // 2, (picture.height - cut[1]) // 2
    box = (left, top, left + cut[0], top + cut[1])
    resized = picture.resize(size, Image.Resampling.BICUBIC, box=box)
    edit = Edit(to_pixels(resized))
    if mask is not None:
        white = to_pixels(mask.crop(box)).float().mean(dim=0) >= 127.5  # [H, W]
        if not white.any():
            raise ConfigError("--mask has no white part, so there is nothing to generate")
        pixels = white[None, None].float()
        # the largest value of each region, so that no white pixel is lost
        edit.mask = F.adaptive_max_pool2d(pixels, size[::-1])[0, 0].bool()
    elif expand is not None:
        margin = (expand[0], expand[2], expand[1], expand[3])  # left, right, top, bottom
        if max(size[0] + sum(margin[:2]), size[1] + sum(margin[2:])) > LARGEST:
            raise ConfigError(f"--expand: sides must stay at most {LARGEST} pixels")
        edit.mask = F.pad(torch.zeros(size[::-1], dtype=torch.bool), margin, value=True)
        edit.pixels = F.pad(edit.pixels, margin, value=128)
        edit.expanded = True
    if edit.mask is not None:
        edit.tokens = F.max_pool2d(edit.mask[None].float(), module.pixels_per_cell)[0].bool()
    return edit


def describe_edit(module: GeneratorModule, picture: Image.Image, edit: Edit) -> str:
    """Say in one line what became of the given picture."""
    height, width = edit.pixels.shape[-2:]
    factor = module.pixels_per_cell
    line = f"image {picture.width}x{picture.height}"
    if (width, height) != picture.size:
        how = "expanded" if edit.expanded else "cut or resized"
        line += f", {how} to {width}x{height}"
    line += f": {width // factor}x{height // factor} tokens"
    if edit.tokens is not None:
        line += f", {int(edit.tokens.sum())} of them generated"
    trained = trained_size(module)
    if (width, height) != trained:
        line += f" (trained on {trained[0]}x{trained[1]} pixels)"
    return line


def vary(settings: Any, strength: float | None, words: Sequence[str]) -> Any:
    """Set how many steps a variation skips: round((1 - strength) steps), at least 1.

    Raises:
        ConfigError: a paper without that setting, a single step, or both words given.
    """
    if not hasattr(settings, "first_step"):
        raise ConfigError("this checkpoint's paper makes no variations; give a --mask")
    if any(w.removeprefix("--").startswith("sampling.first_step=") for w in words):
        if strength is not None:
            raise ConfigError("--strength and sampling.first_step exclude each other; set one")
        return settings
    if settings.steps < 2:
        raise ConfigError(f"a variation needs sampling.steps of at least 2, got {settings.steps}")
    first = round((1 - (0.7 if strength is None else strength)) * settings.steps)
    return dataclasses.replace(settings, first_step=min(max(first, 1), settings.steps - 1))

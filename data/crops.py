"""From an upright RGB picture to a square of a given size: crops by name.

Every one is a definition that released code has; they do not agree with each other.
"""

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from PIL import Image

Filter = Image.Resampling


class CropRule(NamedTuple):
    """One way to cut a square."""

    cut: Callable[[Image.Image, int, random.Random], Image.Image]
    """Picture, width of the square, and what draws -> the square."""
    seen: str
    """The crop that validation sees: itself, or one that draws nothing."""
    least: Callable[[int], int] | None = None
    """Width of the square -> least short side that a reduced decoding must keep; none allowed
    where every pixel counts."""


def crop_first(
    image: Image.Image,
    size: int,
    rng: random.Random | None = None,
    resample: Filter = Filter.BICUBIC,
) -> Image.Image:
    """Cut the largest square in the centre, offsets rounded down, then resize it."""
    return _resized(_square(image, lambda slack: slack // 2), size, resample)


def random_crop(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """Cut the largest square anywhere along the long side, then resize it (bicubic)."""
    return _resized(_square(image, lambda slack: rng.randint(0, slack)), size)


def adm(image: Image.Image, size: int, rng: random.Random | None = None) -> Image.Image:
    """Resize and cut the centre as ADM does (openai/guided-diffusion, image_datasets.py).

    Halved with box filtering while the short side has twice the pixels or more, then bicubic to
    the short side, then cut; references of ImageNet scores (and LDMAE's latents) are made so.
    """
    image = _no_line(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Filter.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Filter.BICUBIC)
    return _cut(image, size, lambda slack: slack // 2)


def dalle(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """Cut as DALL-E and VQ-Diffusion train (microsoft/VQ-Diffusion, image_preprocessor.py).

    The largest square with its offset in [3/8, 5/8) of the slack, resized to t drawn from [size,
    min(side, 9/8 size)], then a square of `size` anywhere in it.
    """

    def near_centre(slack: int) -> int:
        low = 3 * slack // 8
        return int(rng.uniform(low, max(low + 1, 5 * slack // 8)))

    image = _square(image, near_centre)
    longest = max(min(image.width, round(9 / 8 * size)), size)
    image = _resized(image, int(rng.uniform(size, longest + 1)))
    return _cut(image, size, lambda slack: rng.randint(0, slack))


def resize_first(
    image: Image.Image,
    size: int,
    rng: random.Random | None = None,
    resample: Filter = Filter.BICUBIC,
) -> Image.Image:
    """Resize the short side to `size` and cut the centre, as torchvision's Resize and CenterCrop.

    The long side is truncated to whole pixels, the offset rounded half to even.
    """
    image = _no_line(image)
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    return _cut(image.resize((width, height), resample), size, lambda slack: round(slack / 2))


def _no_line(image: Image.Image) -> Image.Image:
    """Cut an extreme shape in its centre: enlarged whole, a line would fill the memory."""
    longest = 8 * min(image.size)
    if max(image.size) <= longest:
        return image
    left, top = (max(0, length - longest) // 2 for length in image.size)
    return image.crop((left, top, image.width - left, image.height - top))


def _square(image: Image.Image, offset: Callable[[int], int]) -> Image.Image:
    """Cut the largest square."""
    return _cut(image, min(image.size), offset)


def _cut(image: Image.Image, side: int, offset: Callable[[int], int]) -> Image.Image:
    """Cut a square; `offset` says where along the slack of width and height."""
    left, top = offset(image.width - side), offset(image.height - side)
    return image.crop((left, top, left + side, top + side))


def _resized(image: Image.Image, size: int, resample: Filter = Filter.BICUBIC) -> Image.Image:
    return image.resize((size, size), resample)


class Frame:
    """Stands for a picture and keeps what of it a crop leaves: its sides, without any pixel."""

    def __init__(self, size: tuple[int, int], box: tuple[float, float, float, float]) -> None:
        self.size, self.box = size, box

    @property
    def width(self) -> int:
        """Pixels along the upper side."""
        return self.size[0]

    @property
    def height(self) -> int:
        """Pixels along the left side."""
        return self.size[1]

    def resize(self, size: tuple[int, int], resample: Any = None) -> "Frame":
        """Return the same with other sides."""
        return Frame(size, self.box)

    def crop(self, box: tuple[int, int, int, int]) -> "Frame":
        """Return a part."""
        left, top, right, bottom = self.box
        across, down = (right - left) / self.width, (bottom - top) / self.height
        part = (
            left + box[0] * across,
            top + box[1] * down,
            left + box[2] * across,
            top + box[3] * down,
        )
        return Frame((box[2] - box[0], box[3] - box[1]), part)


def box_of(
    name: str, sides: tuple[int, int], size: int, rng: random.Random
) -> tuple[float, float, float, float]:
    """Return where a crop lies in a picture, in shares of its width and height.

    Args:
        name: one of CROPS.
        sides: width and height of the picture.
        size: width and height of the square that is made of it.
        rng: draws what the crop draws; in the state that it has when the picture is cut.

    Returns:
        Left, top, right and bottom, from 0 to 1.
    """
    picture: Any = Frame(sides, (0.0, 0.0, 1.0, 1.0))
    kept: Any = CROPS[name].cut(picture, size, rng)
    return kept.box


CROPS: Mapping[str, CropRule] = {
    "center": CropRule(crop_first, "center", lambda size: size),
    "random": CropRule(random_crop, "center", lambda size: size),
    "adm": CropRule(adm, "adm"),
    "dalle": CropRule(dalle, "resize_bicubic", lambda size: max(size, round(9 / 8 * size))),
    "resize_bicubic": CropRule(resize_first, "resize_bicubic"),
    "resize_bilinear": CropRule(partial(resize_first, resample=Filter.BILINEAR), "resize_bilinear"),
    "resize_lanczos": CropRule(partial(resize_first, resample=Filter.LANCZOS), "resize_lanczos"),
}

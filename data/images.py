"""From the bytes of a web image to a square RGB picture, and from there to a batch."""

import io
import math
import random
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from data.crops import CROPS, box_of
from data.skips import SampleError
from data.view import Crop

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF")
MAX_PIXELS = 64_000_000  # a header can promise more than any memory holds
BOMB = "decompression bomb"
TRUNCATED = "truncated image"
CORRUPT = "corrupt image"


def open_image(data: bytes) -> Image.Image:
    """Open an encoded image without decoding it; of an animation the first frame.

    Raises:
        PIL.Image.DecompressionBombError: the header promises more than MAX_PIXELS.
        OSError: not a JPEG, PNG, WebP or AVIF.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below is ours
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are too many")
    return image


def reduce(image: Image.Image, least: int | None) -> None:
    """Let a JPEG be decoded at a half, a quarter or an eighth of its size.

    Args:
        image: not decoded yet.
        least: of the short side; None decodes every pixel.
    """
    if least is not None:
        scale = least / min(image.size)
        width, height = (math.ceil(side * scale) for side in image.size)
        image.draft(None, (width, height))


def crop_box(
    data: bytes, resolution: int, crop: Crop, rng: random.Random
) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
    """Return width and height of an upright picture, and where `decode_image` cuts it, reduced.

    Args:
        data, resolution, crop, rng: as `decode_image` takes them.

    Returns:
        Sides in pixels, and left, top, right and bottom of the square in pixels; with an enlarged
        or reduced picture these are no whole numbers.
    """
    image, rule = open_image(data), CROPS[crop]
    sides = image.size
    reduce(image, rule.least(resolution) if rule.least else None)
    decoded = image.size
    if image.getexif().get(ExifTags.Base.Orientation, 1) > 4:  # it lies on its side
        sides, decoded = sides[::-1], decoded[::-1]
    left, top, right, bottom = box_of(crop, decoded, resolution, rng)
    (width, height) = sides
    return sides, (left * width, top * height, right * width, bottom * height)


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn any mode into upright RGB; what is transparent becomes white, 16 bits become 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        wide = np.asarray(image, np.float64) / 257
        image = Image.fromarray(np.rint(wide).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    return image.convert("RGB")


def upright(data: bytes, least: int | None = None) -> Image.Image:
    """Decode to upright RGB.

    Args:
        data: encoded JPEG, PNG, WebP or AVIF.
        least: a JPEG may come at a half, a quarter or an eighth of its size, whose short side is
            at least so long; None decodes every pixel.

    Raises:
        SampleError: BOMB (more than MAX_PIXELS by the header), TRUNCATED or CORRUPT.
    """
    try:
        image = open_image(data)
        reduce(image, least)
        return to_rgb(image)
    except Image.DecompressionBombError as error:
        raise SampleError(BOMB, why=str(error)) from error
    except Exception as error:  # whatever damaged bytes make of their decoder
        kind = TRUNCATED if "truncated" in str(error).lower() else CORRUPT
        # Pillow names a file in memory by its address
        raise SampleError(kind, why=str(error).partition(" <_io.")[0]) from error


def decode_image(
    data: bytes,
    resolution: int,
    *,
    crop: Crop = "center",
    rng: random.Random | None = None,
    mirror: bool = False,
    reduced: bool = False,
) -> np.ndarray:
    """Decode, cut and resize to [resolution, resolution, 3] uint8.

    Args:
        data: encoded JPEG, PNG, WebP or AVIF.
        resolution: width and height of the result.
        crop: one of `data.crops.CROPS`.
        rng: draws what the crop draws.
        mirror: mirror it.
        reduced: decode a JPEG at a half, a quarter or an eighth of its size where the crop allows
            and that is still as large as the result. Faster; pixels differ slightly.

    Raises:
        SampleError: BOMB (more than MAX_PIXELS by the header), TRUNCATED or CORRUPT.
    """
    rule = CROPS[crop]
    image = upright(data, rule.least(resolution) if reduced and rule.least else None)
    image = rule.cut(image, resolution, rng or random.Random(0))
    if mirror:
        image = ImageOps.mirror(image)
    return np.array(image)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Map uint8 [..., H, W, 3] to float [..., 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pixels).movedim(-1, -3).float() / 127.5 - 1


def stack(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put samples with `pixels` uint8 [H, W, 3] together, as a part of a batch.

    Returns:
        {"pixels": [B, H, W, 3] uint8, "caption": list, "key": list}, and "label" [B] int64 where
        every sample has one.
    """
    part: dict[str, Any] = {
        "pixels": torch.from_numpy(np.stack([s["pixels"] for s in samples])),
        "caption": [s["caption"] for s in samples],
        "key": [s["key"] for s in samples],
    }
    if all("label" in s for s in samples):
        part["label"] = torch.tensor([s["label"] for s in samples])
    return part


def join(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the parts that `stack` made to a batch.

    Returns:
        {"image": [B, 3, H, W] in [-1, 1], "caption": list, "key": list}, and "label" [B] int64
        where every sample has one.
    """
    pixels = torch.cat([part["pixels"] for part in parts])  # [B, H, W, 3] uint8
    batch: dict[str, Any] = {"image": pixels.movedim(-1, -3).float() / 127.5 - 1}
    for name in ("caption", "key"):
        batch[name] = [text for part in parts for text in part[name]]
    if all("label" in part for part in parts):
        batch["label"] = torch.cat([part["label"] for part in parts])
    return batch

"""From the bytes of a web image to a square RGB picture, and from there to a batch."""

import io
import random
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.view import Crop

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64_000_000  # a header can promise more than any memory holds


def open_image(data: bytes) -> Image.Image:
    """Open an encoded image without decoding it.

    Raises:
        PIL.Image.DecompressionBombError: the header promises more than MAX_PIXELS.
        OSError: not a JPEG, PNG or WebP.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below is ours
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are too many")
    return image


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


def adm_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Resize and cut the centre as ADM does (openai/guided-diffusion, image_datasets.py).

    Halved with box filtering while the short side has twice the pixels or more, then bicubic to
    the short side, then cut; references of ImageNet scores (and LDMAE's latents) are made so.

    Args:
        image: RGB.
        resolution: width and height of the result.
    """
    side = min(image.size)
    if max(image.size) > 8 * side:  # enlarged whole, a line of pixels would fill the memory
        left, top = (max(0, length - 8 * side) // 2 for length in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def decode_image(
    data: bytes,
    resolution: int,
    *,
    crop: Crop = "center",
    rng: random.Random | None = None,
    mirror: bool = False,
) -> np.ndarray:
    """Decode, cut the largest square and resize it, smoothly, to [resolution, resolution, 3] uint8.

    The square is cut before resizing: the same pixels as resizing the short side first, and a
    picture of 1 x 60,000 pixels costs no memory. With crop "adm" both are done by `adm_crop`.

    Args:
        data: encoded JPEG, PNG or WebP.
        resolution: width and height of the result.
        crop: where along the long side the square is cut; adm is the centre.
        rng: draws crop "random".
        mirror: mirror it.

    Raises:
        PIL.Image.DecompressionBombError: more than MAX_PIXELS.
        OSError: the image is corrupt.
    """
    image = to_rgb(open_image(data))
    if crop == "adm":
        image = adm_crop(image, resolution)
    else:
        side = min(image.size)
        where = (rng or random.Random(0)).random() if crop == "random" else 0.5
        left, top = round((image.width - side) * where), round((image.height - side) * where)
        box = (left, top, left + side, top + side)
        image = image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)
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

"""The handwritten digits that scikit-learn ships: 1,797 real images of 8 x 8, with captions."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASES = (
    "a handwritten {}",
    "the digit {}, handwritten",
    "a picture of a handwritten {}",
    "{} written by hand",
)
VAL_EVERY = 6


def digit_caption(label: int, variant: int = 0) -> str:
    """Say which digit (0 to 9) it is, in one of several phrasings."""
    return PHRASES[variant % len(PHRASES)].format(NAMES[label])


def digits(split: str, *, resolution: int = 32, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the samples of a split; every sixth image is validation.

    Args:
        split: train (1,498 images) or val (299).
        resolution: the 8 x 8 images are enlarged to it with bicubic filtering.
        seed: draws the phrasings.

    Yields:
        {"key": str, "image": uint8 [H, W, 3], "caption": str, "label": int 0 to 9}.

    Raises:
        ValueError: an unknown split.
    """
    from sklearn.datasets import load_digits  # a second, which the phrases alone do not cost

    if split not in ("train", "val"):
        raise ValueError(f"digits have the splits train, val, not {split!r}")
    source = load_digits()
    for index, (pixels, label) in enumerate(zip(source.images, source.target, strict=True)):
        if (index % VAL_EVERY == VAL_EVERY - 1) != (split == "val"):
            continue
        small = Image.fromarray(np.rint(pixels * 255 / 16).astype(np.uint8))  # values 0 to 16
        large = small.resize((resolution, resolution), Image.Resampling.BICUBIC)
        variant = int(np.random.default_rng([seed, index]).integers(len(PHRASES)))
        yield {
            "key": f"{index:05d}",
            "image": np.array(large.convert("RGB")),
            "caption": digit_caption(int(label), variant),
            "label": int(label),
        }

"""Digit accuracy: does a reader of real handwritten digits read what was asked?"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor

from eval.interval import Score, mean_score

SEED = 0  # of the split: the reader is a fixed measure, not a setting


@cache
def digit_reader() -> tuple[SVC, float]:
    """Train a support vector machine (RBF kernel) on real 8x8 digits; takes under a second.

    Returns:
        The reader, trained on four fifths of scikit-learn's 1,797 digits, and the share of the
        other fifth that it reads right.
    """
    train_x, test_x, train_y, test_y = held_out_digits()
    reader = SVC(kernel="rbf", C=10).fit(train_x, train_y)
    return reader, float(reader.score(test_x, test_y))


def held_out_digits() -> list[np.ndarray]:
    """Return train and test pixels [n, 64] in 0..16 and train and test labels [n], stratified."""
    pixels, labels = load_digits(return_X_y=True)
    return train_test_split(pixels, labels, test_size=0.2, random_state=SEED, stratify=labels)


def read_digits(images: Tensor) -> np.ndarray:
    """Read pictures of digits.

    Args:
        images: [N, 3, H, W] uint8, light digit on a dark ground; averaged to grey 8x8 in 0..16.

    Returns:
        [N] int64 in 0..9.

    Raises:
        ValueError: pictures of another type or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"digits are read from uint8 [N, 3, H, W], got {images.dtype} {list(images.shape)}"
        )
    grey = images.float().mean(dim=1, keepdim=True)  # [N, 1, H, W]
    pixels = F.interpolate(grey, (8, 8), mode="area").flatten(1) * (16 / 255)  # [N, 64]
    return digit_reader()[0].predict(pixels.cpu().numpy())


def score_digits(
    images: Tensor,
    asked: Sequence[int] | Tensor,
    *,
    prefix: str = "eval",
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, Score], list[dict[str, Any]]]:
    """Score generated digits against the asked ones.

    Args:
        images: [N, 3, H, W] uint8.
        asked: N labels in 0..9.
        prefix: put before the names.
        resamples: bootstrap draws of the interval.
        seed: seed of the bootstrap.

    Returns:
        scores: `prefix`/digit_accuracy, and /digit_accuracy/0 ... /9 for the digits that were
            asked; each {"value", "low", "high", "n", "model", "reader_accuracy"}.
        verdicts: {"right": bool, "wrong": [] or ["digit"], "read": int, "text": str} per picture.

    Raises:
        ValueError: no pictures, or labels of another number.
    """
    labels = np.asarray(asked, dtype=np.int64)
    if len(labels) != len(images):
        raise ValueError(f"{len(images)} pictures and {len(labels)} labels do not pair up")
    read = read_digits(images)
    what: dict[str, Any] = {
        "model": "SVM (RBF, C=10) on 1,437 of the 8x8 digits of scikit-learn",
        "reader_accuracy": digit_reader()[1],
        "resamples": resamples,
        "seed": seed,
    }
    name = f"{prefix}/digit_accuracy"
    scores = {name: mean_score(read == labels, **what)}
    for digit in np.unique(labels):
        scores[f"{name}/{digit}"] = mean_score((read == labels)[labels == digit], **what)
    verdicts = [
        {
            "right": bool(r == a),
            "wrong": [] if r == a else ["digit"],
            "read": int(r),
            "text": f"a handwritten {r}",
        }
        for r, a in zip(read, labels, strict=True)
    ]
    return scores, verdicts

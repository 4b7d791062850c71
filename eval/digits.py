"""Digit accuracy: does a classifier of real handwritten digits read what was asked?"""

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor

from eval.interval import Scored, mean_score
from eval.metric import Metric
from eval.rows import Asked, Measured

SEED = 0  # of the split: the classifier is a fixed measure, not a setting
MODEL = "SVM (RBF, C=10) on 1,437 of the 8x8 digits of scikit-learn"
SHOWN = {
    "digit_accuracy": Metric(
        "Digit accuracy", "samples that a classifier reads as asked", better="higher"
    ),
}


def measure_digits(images: Tensor, asked: Asked, first: int) -> Measured:
    """Return the rows of `DigitRows`, see `eval.rows.Measure`."""
    return Measured({"read": read_digits(images).astype(np.int16)}, models={"read": MODEL})


@cache
def digit_classifier() -> tuple[SVC, float]:
    """Train a support vector machine (RBF kernel) on real 8x8 digits; takes under a second.

    Returns:
        The classifier, trained on four fifths of scikit-learn's 1,797 digits, and the fraction of
        the other fifth that it reads right.
    """
    train_x, test_x, train_y, test_y = held_out_digits()
    classifier = SVC(kernel="rbf", C=10).fit(train_x, train_y)
    return classifier, float(classifier.score(test_x, test_y))


def held_out_digits() -> list[np.ndarray]:
    """Return train and test pixels [n, 64] in 0..16 and train and test labels [n], stratified."""
    pixels, labels = load_digits(return_X_y=True)
    return train_test_split(pixels, labels, test_size=0.2, random_state=SEED, stratify=labels)


def read_digits(images: Tensor) -> np.ndarray:
    """Read digits, light on dark, [N, 3, H, W] uint8 averaged to grey 8x8 in 0..16: [N] int64.

    Raises:
        ValueError: pictures of another type or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"digits are read from uint8 [N, 3, H, W], got {images.dtype} {list(images.shape)}"
        )
    grey = images.float().mean(dim=1, keepdim=True)  # [N, 1, H, W]
    pixels = F.interpolate(grey, (8, 8), mode="area").flatten(1) * (16 / 255)  # [N, 64]
    return digit_classifier()[0].predict(pixels.cpu().numpy())


def score_digits(
    made: Measured, asked: Asked, reference: Measured | None, *, prefix: str, **what: Any
) -> Scored:
    """Score generated digits against the asked "label" in 0..9, see `eval.scorers.Scorer`.

    Returns:
        scores: `prefix`/digit_accuracy, and /digit_accuracy/0 ... /9 for the digits that were
            asked, with "reader_accuracy".
        verdicts: {"right": bool, "wrong": [] or ["digit"], "read": int, "text": str} per picture.
    """
    if len(made) != len(asked):
        raise ValueError(f"{len(made)} pictures and {len(asked)} labels do not pair up")
    read = made.rows["read"]
    labels = np.array([a["label"] for a in asked])
    right = read == labels
    what = {"model": made.models["read"], "reader_accuracy": digit_classifier()[1], **what}
    name = f"{prefix}/digit_accuracy"
    scores = {name: mean_score(right, **what)}
    for digit in np.unique(labels):
        scores[f"{name}/{digit}"] = mean_score(right[labels == digit], **what)
    verdicts: list[dict[str, Any]] = []
    for digit, ok in zip(read.tolist(), right.tolist(), strict=True):
        verdict = {"right": ok, "wrong": [] if ok else ["digit"]}
        verdicts.append({**verdict, "read": digit, "text": f"a handwritten {digit}"})
    return scores, verdicts

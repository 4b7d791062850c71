"""What the names of scores mean, and the one way in which a score is written.

A name is PREFIX/METRIC: eval/fd_scenes, eval/heldout/fd_scenes, tokenizer/psnr. A further /PART is
a part of it, /noise=0.1 the same score where something had that value; METRIC_floor and METRIC_real
are what it is to be compared with.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from eval.interval import Score
from eval.metric import Metric

Scores = Mapping[str, Score]


class ScoreTable(NamedTuple):
    """One table in words, for a page and for a terminal."""

    title: str
    heads: list[str]
    rows: list[list[str]]


FIRST_STAGES = ("tokenizer", "autoencoder")  # beginnings of the names of their scores
COMPANIONS = {"_floor": "floor", "_real": "real pictures"}
SPLITS = {
    "val": "Val",
    "heldout": "Heldout: combinations never seen in training",
    "partial": "Partial: captions that leave something out, each asked 4 times",
    "edit": "Edits: half of a scene generated anew for a caption with another thing",
    "superres": "Super-resolution: val, reduced to the classifier's size",
    "superres heldout": "Super-resolution: heldout, reduced to the classifier's size",
    "superres partial": "Super-resolution: partial, reduced to the classifier's size",
    "tokenizer": "Tokenizer: reconstructions of val",
    "autoencoder": "Autoencoder: reconstructions of val",
}


def notation(score: Score | None) -> str:
    """Write a score with its 95 % interval, rounded to the width of that: 0.92 (0.90 to 0.94)."""
    if score is None:
        return ""
    value, low, high = (score.get(key) for key in ("value", "low", "high"))
    if low is None or high is None:
        return number(value)
    if not low < high < math.inf:
        return f"{number(value)} ({number(low)} to {number(high)})"
    # the last digit shown is 1/35 to 1/3.5 of the interval
    digits = max(0, -math.floor(math.log10((high - low) / 3.5)))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def number(value: Any) -> str:
    """Write a number without an interval, to four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def metric_of(name: str, metrics: Mapping[str, Metric]) -> Metric:
    """Return the metric that a score is of; one that is not known is called as it is stored."""
    last = name.rpartition("/")[2]
    return metrics.get(last) or Metric(last.replace("_", " ").capitalize(), "")


def split_of(name: str) -> str:
    """Return heldout for eval/heldout/x, val for eval/x and tokenizer for tokenizer/x."""
    head, *between = name.split("/")[:-1] or ["eval"]
    return " ".join(between if head == "eval" else [head, *between]) or "val"


def is_generated(name: str) -> bool:
    """Say whether a score is the run's own, or else that of the first stage below its generator."""
    return name.partition("/")[0] not in FIRST_STAGES


def parent_of(name: str, scores: Iterable[str]) -> str | None:
    """Return the score that `name` is a part of."""
    above = name.rpartition("/")[0]
    return above if above in scores else None


def scan_value(name: str) -> tuple[str, str, float] | None:
    """Take apart the name a/b/noise=0.1 to a/b, noise, 0.1; None for a name without a value."""
    score, _, last = name.rpartition("/")
    what, equals, value = last.partition("=")
    return (score, what, float(value)) if equals else None


def scans(scores: Scores) -> dict[tuple[str, str], dict[float, str]]:
    """Collect scores at several values of something; the score without a value is that at 0.

    Returns:
        {(score, what): {value: name of the score there}}, in order of the values.
    """
    found: dict[tuple[str, str], dict[float, str]] = {}
    for name in scores:
        if taken := scan_value(name):
            score, what, value = taken
            found.setdefault((score, what), {0.0: score} if score in scores else {})[value] = name
    return {key: dict(sorted(names.items())) for key, names in found.items()}


def main_scores(scores: Scores) -> list[str]:
    """Return the names of the scores that are no part, companion or scan of another."""

    def beside(name: str) -> bool:
        return any(name.endswith(e) and name.removesuffix(e) in scores for e in COMPANIONS)

    return [n for n in scores if not (parent_of(n, scores) or beside(n) or scan_value(n))]

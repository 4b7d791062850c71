"""Network calls per picture: what a way of sampling costs, whatever its steps are called."""

from collections.abc import Sequence

import numpy as np

from eval.interval import Score, mean_score
from eval.metric import Metric

SHOWN = {
    "network_calls": Metric("Network calls", "calls of the network per picture", better="lower"),
    "spread": Metric("Spread", "standard deviation over pictures"),
    "seconds": Metric("Seconds", "to draw, decode and write a picture", better="lower"),
    "parameters": Metric("Parameters", "trained ones, with the text encoder's", better="lower"),
}


def score_calls(
    calls: Sequence[int], *, prefix: str, resamples: int = 1000, seed: int = 0
) -> dict[str, Score]:
    """Return the mean of the calls per picture and, where they differ, their standard deviation.

    Args:
        calls: one number per picture, at least one.
        prefix: put before the names.
        resamples: draws of the interval's bootstrap.
        seed: seed of the draws.
    """
    numbers = np.asarray(calls, dtype=np.float64)
    name = f"{prefix}/network_calls"
    n, least = len(numbers), float(numbers.min())
    if least == numbers.max():  # once for each is a number, not a share
        return {name: {"value": least, "low": least, "high": least, "n": n}}
    spread = {"value": float(numbers.std()), "low": None, "high": None, "n": n}
    return {
        name: mean_score(numbers, resamples=resamples, seed=seed),
        f"{name}/spread": spread,
    }

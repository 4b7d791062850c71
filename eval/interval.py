"""Scores with their sample size and a bootstrap interval."""

from collections.abc import Callable
from typing import Any

import numpy as np

Score = dict[str, Any]
Scored = tuple[dict[str, Score], list[dict[str, Any]]]
"""Scores by name, and of every picture what is right and wrong in it."""


def mean_score(values: Any, *, resamples: int = 1000, seed: int = 0, **what: Any) -> Score:
    """Return the mean of independent values with its percentile bootstrap interval.

    The interval spans the 2.5 % and 97.5 % quantiles of the means of `resamples` draws with
    replacement (Efron 1979). Values that are all equal give an interval of width 0.

    Args:
        values: n numbers, one per independent unit (a picture, not a thing in it).
        resamples: number of draws.
        seed: seed of the draws.
        what: what the score is, stored beside "value", "low", "high" and "n" (model, ...).
    """
    values = np.asarray(values, dtype=np.float64).ravel()  # [n]
    n = values.size
    if n == 0:
        raise ValueError("a score needs at least one picture, got none")
    rng = np.random.default_rng(seed)
    # one resample at a time: 1000 x 30,000 indices at once would need 240 MB
    means = [values[rng.integers(0, n, n)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "n": n, **what}


def normal_score(
    value: float,
    n: int,
    resample: Callable[[np.ndarray], float],
    *,
    resamples: int = 200,
    seed: int = 0,
    **what: Any,
) -> Score:
    """Return a statistic with the interval value +- 1.96 x bootstrap standard error.

    For statistics that a resample biases upwards, as repeated pictures do to a Frechet distance:
    the percentiles would lie above the value itself, the spread is still right.

    Args:
        value: the statistic of the full sample.
        n: size of the sample.
        resample: maps drawn indices [n] int64 to the statistic of that resample.
        resamples, seed, what: as in `mean_score`.
    """
    rng = np.random.default_rng(seed)
    spread = float(np.std([resample(rng.integers(0, n, n)) for _ in range(resamples)], ddof=1))
    low, high = value - 1.96 * spread, value + 1.96 * spread
    return {"value": float(value), "low": low, "high": high, "n": n, **what}

"""Scores with their sample size and a 95 % interval."""

import math
from typing import Any

import numpy as np

Z = 1.959964
"""Quantile of the normal distribution that leaves 2.5 % on either side."""

Score = dict[str, Any]
Scored = tuple[dict[str, Score], list[dict[str, Any]]]
"""Scores by name, and of every picture what is right and wrong in it."""


def mean_score(values: Any, *, resamples: int = 1000, seed: int = 0, **what: Any) -> Score:
    """Return the mean of independent values with its 95 % interval.

    Values that are all 0 or 1 make a proportion p, which has Wilson's interval (1927)
    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n): it has a width also where
    all are equal. Others have the 2.5 % and 97.5 % quantiles of the means of `resamples` draws
    with replacement (Efron 1979), of width 0 where all are equal.

    Args:
        values: n numbers, one per independent unit (a picture, not a thing in it).
        resamples: number of draws.
        seed: seed of the draws.
        what: what the score is, stored beside "value", "low", "high" and "n" (model, ...).

    Raises:
        ValueError: no values.
    """
    values = np.asarray(values, dtype=np.float64).ravel()  # [n]
    n, mean = values.size, float(values.mean()) if values.size else 0.0
    if n == 0:
        raise ValueError("a score needs at least one picture, got none")
    if np.isin(values, (0, 1)).all():
        half = Z * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
        low, high = ((mean + Z**2 / (2 * n) + end) / (1 + Z**2 / n) for end in (-half, half))
        low, high = max(low, 0.0), min(high, 1.0)  # rounding: the ends of p = 0 and 1 are exact
    else:
        rng = np.random.default_rng(seed)
        # one resample at a time: 1000 x 30,000 indices at once would need 240 MB
        means = [values[rng.integers(0, n, n)].mean() for _ in range(resamples)]
        low, high = map(float, np.quantile(means, [0.025, 0.975]))
    return {"value": mean, "low": low, "high": high, "n": n, **what}


def error_score(value: float, error: float, n: int, **what: Any) -> Score:
    """Return a statistic with the interval value +- 1.96 standard errors.

    Args:
        value: the statistic of the sample.
        error: its standard error.
        n: size of the sample.
        what: as in `mean_score`, whose draws are not needed here.
    """
    about = {k: v for k, v in what.items() if k not in ("resamples", "seed")}
    return {"value": value, "low": value - Z * error, "high": value + Z * error, "n": n, **about}

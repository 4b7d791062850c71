"""Kernel distances: KID, and CMMD."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.distances import sides, told
from eval.interval import Score, Scored, error_score
from eval.metric import Metric
from eval.rows import Asked, Measured
from eval.spaces import SPACES

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Rows x [n, d] and y [m, d] float64 to k(x_i, y_j) [n, m]."""

BLOCK = 256  # rows whose kernel values are in memory at once
SUBSETS, SUBSET_SIZE = 100, 1000  # the usual ones of KID
SIGMA, SCALE = 10.0, 1000.0  # of CMMD
SHOWN = {
    **{
        space.named("kid"): Metric(
            space.named("kid").upper().replace("_", " "),
            f"cubic kernel distance in features of {space.what}",
            better="lower",
        )
        for space in SPACES.values()
    },
    **{
        space.named("cmmd"): Metric(
            space.named("cmmd").upper().replace("_", " "),
            f"Gaussian kernel distance in features of {space.what}, x 1000",
            better="lower",
        )
        for space in SPACES.values()
    },
}


def cubic(x: Tensor, y: Tensor) -> Tensor:
    """Return (x.y / d + 1)^3, the kernel of KID (Binkowski et al., 1801.01401, eq. 4)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """Return exp(-|x - y|^2 / (2 sigma^2)), sigma 10, of CMMD (Jayasumana et al., 2401.09603)."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return torch.exp(squares.clamp(min=0) / (-2 * SIGMA**2))


def mmd(x: Tensor, y: Tensor, kernel: Kernel, unbiased: bool) -> tuple[float, Tensor, Tensor]:
    """Return the squared maximum mean discrepancy of two samples, in blocks of rows.

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y) (Gretton et al. 2012, eq. 3 and 5); unbiased
    leaves out the pairs of a row with itself.

    Args:
        x: [n, d] float64.
        y: [m, d] float64.
        kernel: their similarity.
        unbiased: U- instead of V-statistic; needs n, m >= 2.

    Returns:
        The value; and how far each row of x [n] and of y [m] moves it: a row's mean similarity to
        its own set less that to the other. 4 var / n of both are added to the squared standard
        error (Serfling 1980, 5.5.1).
    """
    own_x, own_y = _own(x, kernel, unbiased), _own(y, kernel, unbiased)
    cross_x, cross_y = torch.zeros_like(own_x), torch.zeros_like(own_y)
    for first in range(0, len(x), BLOCK):
        values = kernel(x[first : first + BLOCK], y)
        cross_x[first : first + BLOCK] = values.mean(dim=1)
        cross_y += values.sum(dim=0)
    cross_y /= len(x)
    value = own_x.mean() + own_y.mean() - 2 * cross_x.mean()
    return float(value), own_x - cross_x, own_y - cross_y


def _own(x: Tensor, kernel: Kernel, unbiased: bool) -> Tensor:
    """Mean similarity [n] of each row to its own set, to the others of it where unbiased."""
    means = torch.zeros(len(x), dtype=x.dtype)
    for first in range(0, len(x), BLOCK):
        rows = x[first : first + BLOCK]
        values = kernel(rows, x[first:])  # [b, n - first], the rest follows by symmetry
        means[first:] += values.sum(dim=0)
        means[first : first + len(rows)] += values[:, len(rows) :].sum(dim=1)
        if unbiased:
            means[first : first + len(rows)] -= values.diagonal()
    return means / (len(x) - unbiased)


def kid(x: Tensor, y: Tensor, subsets: Iterator[tuple[Any, Any]]) -> tuple[Tensor, float]:
    """Return the unbiased squared MMD of pairs of subsets under the cubic kernel.

    Args:
        x: [n, d] features.
        y: [m, d] features.
        subsets: rows of x and of y, S times.

    Returns:
        The values [S] float64, whose mean is KID; and its standard error: that of the complete
        statistic, from every row's mean influence, and that of the S draws, added as squares.
    """
    values, moved = [], [torch.zeros(len(z), 2, dtype=torch.float64) for z in (x, y)]
    for rows in subsets:
        own, other = (z[torch.as_tensor(r)].double() for z, r in zip((x, y), rows, strict=True))
        value, *influences = mmd(own, other, cubic, unbiased=True)
        values.append(value)
        for sums, row, influence in zip(moved, rows, influences, strict=True):
            sums[torch.as_tensor(row), 0] += influence
            sums[torch.as_tensor(row), 1] += 1
    found = torch.tensor(values, dtype=torch.float64)
    square = float(found.var(correction=0)) / len(found)
    for sums in moved:
        seen = sums[sums[:, 1] > 0]
        square += 4 * float((seen[:, 0] / seen[:, 1]).var()) / len(sums)
    return found, square**0.5


def draws(n: int, m: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draw the rows of KID's 100 pairs of subsets of 1,000, or of the smaller set's size."""
    rng, size = np.random.default_rng(seed), min(n, m, SUBSET_SIZE)
    for _ in range(SUBSETS):
        yield rng.choice(n, size, replace=False), rng.choice(m, size, replace=False)


def score_kid(
    made: Measured, asked: Asked, reference: Measured | None, *, prefix: str, **what: Any
) -> Scored:
    """Score pictures by KID, or the same in other features, see `eval.scorers.Scorer`.

    Args:
        made: rows "features..." of eval/spaces.py.
        asked: not looked at.
        reference: such rows of real pictures.
        prefix: put before the names.
        what: "seed" draws the subsets.

    Returns:
        scores: `prefix`/kid (kid_tf, kd_dinov2, ...) with "subsets", "subset_size" and "std",
            their spread.
        verdicts: empty ones.

    Raises:
        ValueError: as `eval.distances.sides`, or fewer than 2 pictures.
    """
    scores: dict[str, Score] = {}
    seed = what.get("seed", 0)
    for side in sides(made, reference, "features"):
        x, y = (torch.as_tensor(rows) for rows in (side.made, side.rows))
        _check_count(x, y)
        values, error = kid(x, y, draws(len(x), len(y), seed))
        size = min(len(x), len(y), SUBSET_SIZE)
        about = {"subsets": SUBSETS, "subset_size": size, "draw_seed": seed}
        spread = float(values.std(correction=0))
        scores[f"{prefix}/{side.space.named('kid')}"] = error_score(
            float(values.mean()), error, len(x), **{**about, "std": spread, **told(side, what)}
        )
    return scores, [{} for _ in range(len(made))]


def score_cmmd(
    made: Measured, asked: Asked, reference: Measured | None, *, prefix: str, **what: Any
) -> Scored:
    """Score pictures by CMMD, or the same in other features, see `eval.scorers.Scorer`.

    1000 times the biased squared MMD of unit vectors under the Gaussian kernel (2401.09603).
    Arguments, results and errors as `score_kid`; names are `prefix`/cmmd, mmd_dinov2, ...
    """
    scores: dict[str, Score] = {}
    for side in sides(made, reference, "features"):
        x, y = (unit(torch.as_tensor(rows)) for rows in (side.made, side.rows))
        _check_count(x, y)
        value, *influences = mmd(x, y, gaussian, unbiased=False)
        error = sum(4 * float(moved.var()) / len(moved) for moved in influences) ** 0.5
        scores[f"{prefix}/{side.space.named('cmmd')}"] = error_score(
            SCALE * value, SCALE * error, len(x), **{"sigma": SIGMA, **told(side, what)}
        )
    return scores, [{} for _ in range(len(made))]


def unit(rows: Tensor) -> Tensor:
    """Scale rows [n, d] to unit length, float64."""
    scaled = rows.to(torch.float64, copy=True)
    return scaled.div_(scaled.norm(dim=1, keepdim=True).clamp(min=1e-12))


def _check_count(x: Tensor, y: Tensor) -> None:
    if min(len(x), len(y)) < 2:
        raise ValueError(
            f"a kernel distance needs at least 2 pictures on either side, got {len(x)}, {len(y)}"
        )

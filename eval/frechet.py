"""Frechet distance between feature sets, from streaming statistics in float64."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eval.interval import Score, error_score

ROWS = 4096  # of features that are float64 at once
POINTS = 15  # of the line that gives the distance at infinitely many pictures


class Moments(NamedTuple):
    """Mean and covariance of features, all that a Frechet distance asks of a reference."""

    mean: Tensor
    """[d] float64."""
    covariance: Tensor
    """[d, d] float64, unbiased."""
    n: int | None = None
    """Number of pictures, where it is known."""


class FeatureStats:
    """Count, mean and summed squared deviations of features, mergeable without loss.

    Attributes:
        n: number of feature rows seen.
        mean: [d] float64.
        m2: [d, d] float64, sum of outer products of the deviations from the mean.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.m2 = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, features: Tensor | np.ndarray) -> "FeatureStats":
        """Return the statistics of features [n, d]."""
        features = torch.as_tensor(features)
        stats = cls(features.shape[1], features.device)
        for part in features.split(ROWS):
            stats.update(part)
        return stats

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance [d, d] float64, M2 / (n - 1), of at least two rows."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, got {self.n}")
        return self.m2 / (self.n - 1)

    def update(self, features: Tensor) -> "FeatureStats":
        """Add features [b, d] of any float type, in float64; return itself."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features must be [b, {len(self.mean)}], got {list(features.shape)}")
        if len(features) == 0:
            return self
        batch = features.to(self.mean)  # [b, d] float64
        mean = batch.mean(dim=0)
        centred = batch - mean
        return self._add(len(batch), mean, centred.T @ centred)

    def merge(self, other: "FeatureStats") -> "FeatureStats":
        """Add the statistics of another set (Chan, Golub & LeVeque 1979); return itself.

        delta = m_b - m_a; m = m_a + delta n_b / n; M2 = M2_a + M2_b + delta delta^T n_a n_b / n.
        """
        return self._add(other.n, other.mean.to(self.mean), other.m2.to(self.m2))

    def _add(self, n: int, mean: Tensor, m2: Tensor) -> "FeatureStats":
        total = self.n + n
        if n == 0:
            return self
        delta = mean - self.mean
        self.m2 = self.m2 + m2 + torch.outer(delta, delta) * (self.n * n / total)
        self.mean = self.mean + delta * (n / total)
        self.n = total
        return self


def frechet_distance(
    a: FeatureStats | Moments, b: FeatureStats | Moments, root: Tensor | None = None
) -> float:
    """Return the squared Frechet distance of two Gaussians fitted to features.

    |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2) (Dowson & Landau 1982; Heusel et al.,
    1706.08500, eq. 6), with tr (S_a S_b)^(1/2) = sum_i sqrt(lambda_i(R^T S_a R)) for any R with
    S_b = R R^T: symmetric, hence real, also where a covariance is singular. Equal sets give 0 up
    to rounding, of either sign.

    Args:
        a: statistics of the one set.
        b: statistics of the other.
        root: R [d, r] of b, where it is known.

    Raises:
        ValueError: features of different widths, or a set of fewer than 2.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} numbers do not compare")
    cov_a = a.covariance
    root = (_root(b.covariance) if root is None else root).to(cov_a)
    product = root.T @ cov_a @ root
    trace_root = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
    gap = a.mean - b.mean.to(a.mean)
    return float(gap @ gap + cov_a.trace() + b.covariance.trace() - 2 * trace_root)


def _root(covariance: Tensor) -> Tensor:
    """R [d, d] with covariance = R R^T; a triangle where it has one, which costs a tenth."""
    triangle, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return triangle
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def _root_of(rows: Tensor, stats: FeatureStats) -> Tensor:
    """R [d, r] with covariance = R R^T of rows [n, d]; fewer rows than numbers make it thin."""
    if len(rows) >= len(stats.mean):
        return _root(stats.covariance)
    return (rows.to(stats.mean) - stats.mean).T / (stats.n - 1) ** 0.5


def frechet_influence(
    a: FeatureStats, b: FeatureStats | Moments, rows: Tensor | np.ndarray
) -> Tensor:
    """Return how far each row of the set behind `a` moves its Frechet distance to `b`.

    The derivative of the distance in the share of a row x in its set,
    2 (m_a - m_b).c + c^T (1 - T) c with c = x - m_a and T the map that carries the one Gaussian
    to the other, T = R^-T (R^T S_b R)^(1/2) R^-1, S_a = R R^T; where S_a is singular, within its
    range. Its standard deviation over the rows, divided by sqrt(n), is the standard error of the
    distance (the delta method).

    Args:
        a: statistics of the rows.
        b: statistics of the other set.
        rows: [n, d] features behind `a`.

    Returns:
        [n] float64, not centred.
    """
    rows = torch.as_tensor(rows)
    if len(rows) < len(a.mean):
        thin = _root_of(rows, a)  # [d, n]
        values, turn = torch.linalg.eigh(thin.T @ thin)
        kept = values > 1e-10 * values[-1]
        values, vectors = values[kept], thin @ turn[:, kept] / values[kept].sqrt()
    else:
        values, vectors = torch.linalg.eigh(a.covariance)
        kept = values > 1e-10 * values[-1]
        values, vectors = values[kept], vectors[:, kept]
    root, inverse = vectors * values.sqrt(), vectors / values.sqrt()  # [d, r]
    middle, turn = torch.linalg.eigh(root.T @ b.covariance.to(root) @ root)  # [r], [r, r]
    half = inverse @ turn * middle.clamp(min=0).pow(0.25)  # [d, r], T = half half^T
    gap = a.mean - b.mean.to(a.mean)
    found = []
    for part in rows.split(ROWS):
        centred = part.to(a.mean) - a.mean
        own, carried = centred.square().sum(dim=1), (centred @ half).square().sum(dim=1)
        found.append(2 * centred @ gap + own - carried)
    return torch.cat(found)


def frechet_infinity(rows: np.ndarray, real: FeatureStats | Moments, seed: int = 0) -> float:
    """Return the Frechet distance that infinitely many pictures would have.

    The distance of n pictures is too high by about a constant over n (Chong & Forsyth,
    1911.07023): the intercept of a line in 1/n through 15 sizes from min(5000, N/10) to N, as
    dgm-eval (2306.04675) takes them. The pictures of a size are the first ones of one seeded
    order, so that every row is read once.

    Args:
        rows: [N, d] features, N >= 20.
        real: statistics of the reference.
        seed: seed of the order.

    Raises:
        ValueError: fewer than 20 rows.
    """
    total = len(rows)
    if total < 20:
        raise ValueError(f"a line in 1/n needs at least 20 pictures, got {total}")
    order = np.random.default_rng(seed).permutation(total)
    sizes = np.unique(np.linspace(min(5000, max(total // 10, 2)), total, POINTS).astype(int))
    width, root = len(real.mean), None
    stats, distances = FeatureStats(width), []
    for size in sizes:
        stats.merge(FeatureStats.of(rows[order[stats.n : size]]))
        if size < width:
            thin = _root_of(torch.from_numpy(rows[order[:size]]), stats)
            distances.append(frechet_distance(real, stats, thin))
        else:
            root = _root(real.covariance) if root is None else root
            distances.append(frechet_distance(stats, real, root))
    return float(np.polynomial.Polynomial.fit(1 / sizes, distances, 1)(0.0))


def frechet_score(
    made: np.ndarray,
    real: np.ndarray | FeatureStats | Moments,
    *,
    paired: bool = False,
    **what: Any,
) -> Score:
    """Return the Frechet distance of features [n, d] to real ones [m, d], with its interval.

    The interval is 1.96 standard errors of `frechet_influence` on either side: what other
    pictures of the same kind would give. It says nothing of the bias that falls with n.

    Args:
        made: features of what is scored.
        real: features of the reference, or their statistics.
        paired: rows of both belong together (m = n), so both move the distance; else the
            reference is taken as fixed.
        what: stored beside the score.
    """
    a = FeatureStats.of(made)
    b = FeatureStats.of(real) if isinstance(real, np.ndarray) else real
    value = frechet_distance(b, a, _root_of(torch.from_numpy(made), a))
    influence = frechet_influence(a, b, made)
    if paired and isinstance(real, np.ndarray) and isinstance(b, FeatureStats):
        influence = influence + frechet_influence(b, a, real)
    error = float(influence.std()) / len(made) ** 0.5
    return error_score(value, error, len(made), **what)

"""Frechet distance between feature sets, from streaming statistics in float64."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.interval import Score, normal_score


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
    def of(cls, features: Tensor) -> "FeatureStats":
        """Return the statistics of features [n, d]."""
        return cls(features.shape[1], features.device).update(features)

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


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """Return the squared Frechet distance of two Gaussians fitted to features.

    |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2) (Dowson & Landau 1982; Heusel et al.,
    1706.08500, eq. 6), with tr (S_a S_b)^(1/2) = sum_i sqrt(lambda_i(R^T S_b R)), S_a = R R^T from
    eigh: symmetric, hence real, also where a covariance is singular. Equal sets give 0 up to
    rounding, of either sign.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} numbers do not compare")
    cov_a, cov_b = a.covariance, b.covariance.to(a.m2)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt()  # [d, d], cov_a = root root^T
    product = root.T @ cov_b @ root
    trace_root = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
    gap = a.mean - b.mean.to(a.mean)
    return float(gap @ gap + cov_a.trace() + cov_b.trace() - 2 * trace_root)


def frechet_score(
    made: np.ndarray, real: np.ndarray, *, paired: bool = False, **what: Any
) -> Score:
    """Return the Frechet distance of features [n, d] to real ones [m, d], with its interval.

    Args:
        made: features of what is scored.
        real: features of the reference.
        paired: rows of both belong together (m = n) and are drawn together for the interval; else
            only `made` is drawn anew.
        what: of `normal_score`.
    """
    a, b = (torch.from_numpy(x).double() for x in (made, real))
    fixed = FeatureStats.of(b)

    def distance(index: np.ndarray) -> float:
        rows = torch.from_numpy(index)
        other = FeatureStats.of(b[rows]) if paired else fixed
        return frechet_distance(FeatureStats.of(a[rows]), other)

    value = frechet_distance(FeatureStats.of(a), fixed)
    return normal_score(value, len(a), distance, **what)

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch

from eval.frechet import FeatureStats, frechet_distance


@pytest.mark.golden
def test_golden_distance(golden: Callable) -> None:
    case = golden("evaluation/frechet")
    for name in case.config["sets"]:
        a, b = (FeatureStats.of(case.io[f"{name}.feats{i}"]) for i in (1, 2))
        for stats, index in ((a, 1), (b, 2)):
            torch.testing.assert_close(
                stats.mean, case.io[f"{name}.mu{index}"], rtol=1e-12, atol=1e-14
            )
            torch.testing.assert_close(
                stats.covariance, case.io[f"{name}.sigma{index}"], rtol=1e-12, atol=1e-14
            )
        assert frechet_distance(a, b) == pytest.approx(
            float(case.io[f"{name}.fid"]), rel=case.tolerance["fid_full"]["rtol"]
        )
        others = {k: v for k, v in case.case["values"][name].items() if not k.endswith("_self")}
        near = case.tolerance["fid_deficient" if name == "deficient" else "fid_full"]["rtol"]
        for package, value in others.items():  # clean-fid, torch-fidelity, torchmetrics, dgm-eval
            assert frechet_distance(a, b) == pytest.approx(value, rel=near), package
        limit = case.tolerance["self"]["atol"]
        assert abs(frechet_distance(a, a)) < limit


@pytest.mark.golden
def test_golden_merge(golden: Callable) -> None:
    case = golden("evaluation/frechet")
    features, cuts = case.io["full.feats1"], case.io["merge.cuts"].tolist()
    merged, streamed = FeatureStats(features.shape[1]), FeatureStats(features.shape[1])
    for start, end in pairwise(cuts):
        merged.merge(FeatureStats.of(features[start:end]))
        streamed.update(features[start:end])
    for stats in (merged, streamed):
        assert stats.n == len(features)
        torch.testing.assert_close(stats.mean, case.io["full.mu1"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(stats.covariance, case.io["full.sigma1"], rtol=1e-12, atol=1e-12)


def given(mean: torch.Tensor, covariance: torch.Tensor) -> FeatureStats:
    stats = FeatureStats(len(mean))
    stats.n, stats.mean, stats.m2 = 1001, mean, covariance * 1000
    return stats


def test_commuting_gaussians_have_a_closed_form() -> None:
    # with commuting covariances tr (S1 S2)^(1/2) = sum sqrt(l1 l2)
    l1, l2 = torch.tensor([4.0, 1.0, 0.25]).double(), torch.tensor([1.0, 9.0, 0.0]).double()
    m1, m2 = torch.zeros(3).double(), torch.tensor([1.0, -2.0, 0.5]).double()
    draws = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(draws)[0]
    a = given(m1, turn @ l1.diag() @ turn.T)
    b = given(m2, turn @ l2.diag() @ turn.T)
    expected = float((m1 - m2).square().sum() + ((l1.sqrt() - l2.sqrt()) ** 2).sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


def test_large_offset_does_not_cost_digits() -> None:
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.standard_normal((500, 4)))
    near, far = FeatureStats.of(features), FeatureStats(4)
    for part in (features + 1e6).split(33):
        far.update(part)
    torch.testing.assert_close(far.covariance, near.covariance, rtol=1e-7, atol=1e-7)


def test_same_distribution_falls_as_one_over_n() -> None:
    rng = np.random.default_rng(1)
    exact = given(torch.zeros(8).double(), torch.eye(8).double())

    def distance(n: int) -> float:
        draws = torch.from_numpy(rng.standard_normal((n, 8)))
        return frechet_distance(FeatureStats.of(draws), exact)

    means = [np.mean([distance(n) for _ in range(20)]) for n in (200, 800)]
    # E = sum l / n + 1/(2n) sum_ij l_i l_j (1 + [i=j]) / (l_i + l_j)
    for n, mean in zip((200, 800), means, strict=True):
        assert mean == pytest.approx((8 + (64 + 8) / 4) / n, rel=0.15)


def test_refuses_other_shapes_and_too_few_rows() -> None:
    with pytest.raises(ValueError, match=r"\[b, 4\]"):
        FeatureStats(4).update(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(FeatureStats(4), FeatureStats(4))
    with pytest.raises(ValueError, match="do not compare"):
        frechet_distance(FeatureStats(4), FeatureStats(5))
    assert math.isfinite(frechet_distance(*[FeatureStats.of(torch.eye(4))] * 2))

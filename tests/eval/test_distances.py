"""FID and its kin: named by their features, beside floor and limit, against pictures or moments."""

from pathlib import Path

import numpy as np
import pytest
import torch

from eval.distances import score_frechet, score_sfid
from eval.frechet import (
    FeatureStats,
    Moments,
    frechet_distance,
    frechet_infinity,
    frechet_influence,
    frechet_score,
)
from eval.rows import Measured
from eval.scorers import METRICS
from eval.spaces import SPACES
from eval.statistics import read_reference


def rows(n: int, seed: int, d: int = 8, shift: float = 0.0) -> np.ndarray:
    draw = np.random.default_rng(seed).standard_normal((n, d))
    return (draw * np.linspace(0.5, 2, d) + shift).astype(np.float32)


def measured(features: np.ndarray, name: str = "features.inception", model: str = "m") -> Measured:
    return Measured({name: features}, models={name: model})


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return frechet_distance(FeatureStats.of(a), FeatureStats.of(b))


def test_only_inception_makes_fid_and_only_clip_cmmd() -> None:
    assert [SPACES[s].named("fid") for s in SPACES] == [
        "fid",
        "fid_tf",
        "fid_pt",
        "fd_dinov2",
        "fd_clip",
        "fd_scenes",
    ]
    assert [SPACES[s].named("kid") for s in ("inception", "dinov2")] == ["kid", "kd_dinov2"]
    assert [SPACES[s].named("cmmd") for s in ("clip", "inception")] == ["cmmd", "mmd"]
    assert {"fid", "fid_floor", "fid_tf_infinity", "sfid", "kd_scenes"} <= METRICS.keys()
    assert METRICS["fid"].better == "lower" and METRICS["fid_floor"].better == ""


def test_all_pictures_meet_the_whole_reference_beside_floor_and_limit() -> None:
    made, real = rows(50, 0, shift=0.3), rows(81, 1)
    scores, verdicts = score_frechet(
        measured(made), [], measured(real), prefix="eval", resamples=9, seed=0, pictures="p"
    )
    assert list(scores) == ["eval/fid", "eval/fid_floor", "eval/fid_infinity"]
    assert verdicts == [{}] * 50
    fid, floor, limit = scores.values()
    assert fid["value"] == pytest.approx(distance(made, real)) and fid["n"] == 50
    assert fid["low"] < fid["value"] < fid["high"] and fid["reference"] == "81 pictures"
    assert floor["value"] == pytest.approx(distance(real[1::2], real[0::2])) and floor["n"] == 40
    assert limit["value"] < fid["value"] and limit["low"] is None
    assert all(s["pictures"] == "p" and s["model"] == "m" for s in scores.values())
    assert not any("resamples" in s for s in scores.values())
    few = score_frechet(measured(made[:10]), [], measured(real), prefix="eval")[0]
    assert list(few) == ["eval/fid", "eval/fid_floor"] and few["eval/fid_floor"]["n"] == 10


def test_every_space_that_both_sides_have_is_scored() -> None:
    names = ["features.inception", "features.inception_tf", "features", "spatial.inception_tf"]
    made, real = (
        Measured({n: rows(12, seed) for n in names}, models=dict.fromkeys(names, "m"))
        for seed in (0, 1)
    )
    found = score_frechet(made, [], real, prefix="eval")[0]
    assert [n for n in found if not n.endswith("floor")] == [
        "eval/fid",
        "eval/fid_tf",
        "eval/fd_scenes",
    ]
    assert list(score_sfid(made, [], real, prefix="eval")[0]) == ["eval/sfid_tf"]
    with pytest.raises(ValueError, match="features of m and other do not compare"):
        score_frechet(made, [], measured(rows(9, 2), model="other"), prefix="eval")


def test_moments_of_a_file_serve_as_a_reference(tmp_path: Path) -> None:
    made, real = rows(40, 0, shift=0.2), rows(60, 1)
    np.savez(tmp_path / "cleanfid.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False))
    spatial = np.cov(real[:, :3], rowvar=False)
    np.savez(
        tmp_path / "adm.npz",
        arr_0=np.zeros((2, 4, 4, 3), np.uint8),
        mu=real.mean(0),
        sigma=np.cov(real, rowvar=False),
        mu_s=real[:, :3].mean(0),
        sigma_s=spatial,
    )
    expected = distance(made, real)
    for name in ("cleanfid", "adm"):
        reference = read_reference(tmp_path / f"{name}.npz", "inception_tf")
        found = score_frechet(
            measured(made, "features.inception_tf"), [], reference, prefix="eval"
        )[0]
        assert list(found) == ["eval/fid_tf", "eval/fid_tf_infinity"]
        assert found["eval/fid_tf"]["value"] == pytest.approx(expected, rel=1e-5)
        assert found["eval/fid_tf"]["reference"].startswith("unknown number")
        assert f"{name}.npz, sha256" in reference.models["features.inception_tf"]
    s = score_sfid(measured(made[:, :3], "spatial.inception_tf"), [], reference, prefix="eval")[0]
    assert s["eval/sfid_tf"]["value"] == pytest.approx(distance(made[:, :3], real[:, :3]), rel=1e-5)


def test_what_holds_no_moments_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", feats=np.zeros((3, 2)))
    np.savez(tmp_path / "flat.npz", mu=np.zeros(3), sigma=np.zeros(3))
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], object), sigma=np.zeros((1, 1)))
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    narrow = read_reference(tmp_path / "narrow.npz", "inception")
    with pytest.raises(ValueError, match="features of 3 and of 8 numbers do not compare"):
        score_frechet(measured(rows(9, 0)), [], narrow, prefix="eval")
    for name in ("text", "other", "flat", "pickled", "none"):
        with pytest.raises(ValueError, match=rf"{name}\.npz holds no statistics"):
            read_reference(tmp_path / f"{name}.npz", "inception")


def test_influence_is_the_derivative_of_the_distance() -> None:
    """Against the distance with a row's weight moved a little."""
    made, real = torch.from_numpy(rows(400, 0, 4, 0.3)).double(), FeatureStats.of(rows(60, 1, 4))
    found = frechet_influence(FeatureStats.of(made), real, made)
    found = found - found.mean()

    def weighted(weights: torch.Tensor) -> float:
        share = weights / weights.sum()
        mean = share @ made
        centred = made - mean
        return frechet_distance(Moments(mean, (centred.T * share) @ centred), real)

    step = 1e-6
    for i in (0, 7, 399):
        moved = [torch.full((400,), 1 / 400, dtype=torch.float64) for _ in range(2)]
        moved[0][i] += step
        moved[1][i] -= step
        slope = (weighted(moved[0]) - weighted(moved[1])) / (2 * step)
        assert slope == pytest.approx(float(found[i]), rel=0.02, abs=0.02)


def test_fewer_pictures_than_features_are_scored_by_a_thin_root() -> None:
    """The same distance, limit and influence as the whole covariance gives, in the time of n^3."""
    made, real = rows(30, 0, 50, 0.3), FeatureStats.of(rows(90, 1, 50))
    stats = FeatureStats.of(made)
    found = frechet_score(made, real)
    assert found["value"] == pytest.approx(frechet_distance(stats, real), rel=1e-7)
    values, vectors = torch.linalg.eigh(stats.covariance)
    vectors, values = vectors[:, values > 1e-10], values[values > 1e-10]
    assert len(values) == 29
    root, inverse = vectors * values.sqrt(), vectors / values.sqrt()
    middle, turn = torch.linalg.eigh(root.T @ real.covariance @ root)
    carry = inverse @ turn * middle.clamp(min=0).sqrt() @ turn.T @ inverse.T
    centred = torch.from_numpy(made).double() - stats.mean
    expected = ((centred - centred @ carry + 2 * (stats.mean - real.mean)) * centred).sum(1)
    torch.testing.assert_close(frechet_influence(stats, real, made), expected, rtol=1e-6, atol=1e-6)
    sizes = np.unique(np.linspace(3, 30, 15).astype(int))
    order = np.random.default_rng(7).permutation(30)
    line = [distance(made[order[:n]], rows(90, 1, 50)) for n in sizes]
    limit = np.polynomial.Polynomial.fit(1 / sizes, line, 1)(0.0)
    assert frechet_infinity(made, real, 7) == pytest.approx(float(limit), rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_the_interval_has_the_width_of_the_spread(shift: float) -> None:
    real = rows(4000, 99, 6)
    scores = [frechet_score(rows(200, seed, 6, shift), real) for seed in range(60)]
    spread = np.std([s["value"] for s in scores])
    width = np.mean([(s["high"] - s["low"]) / 2 / 1.96 for s in scores])
    assert width == pytest.approx(spread, rel=0.35)


def test_the_limit_takes_the_bias_of_few_pictures_away() -> None:
    exact = Moments(torch.zeros(6).double(), torch.eye(6).double())
    draw = np.random.default_rng(0).standard_normal((600, 6))
    single = frechet_distance(FeatureStats.of(draw), exact)
    limits = [frechet_infinity(draw, exact, seed) for seed in range(8)]
    assert abs(np.mean(limits)) < single / 2
    assert frechet_infinity(draw, exact, 3) == frechet_infinity(draw, exact, 3) == limits[3]
    with pytest.raises(ValueError, match="at least 20"):
        frechet_infinity(draw[:19], exact)

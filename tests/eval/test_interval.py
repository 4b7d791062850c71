import numpy as np
import pytest

from eval.interval import error_score, mean_score


@pytest.mark.parametrize("low", [0.0, 0.3])  # Wilson, bootstrap
def test_interval_covers_the_truth_about_as_often_as_it_says(low: float) -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        score = mean_score(low + (rng.random(100) < 0.8), resamples=300, seed=trial)
        inside += score["low"] <= low + 0.8 <= score["high"]
    assert 0.88 <= inside / 200 <= 0.99


def test_score_says_what_it_is() -> None:
    score = mean_score([0.0, 1.0, 1.0, 1.0], model="coin", seed=3)
    assert score["value"] == 0.75 and score["n"] == 4 and score["model"] == "coin"
    assert score["low"] < 0.75 < score["high"] <= 1
    assert score == mean_score([0.0, 1.0, 1.0, 1.0], model="coin", seed=3)
    with pytest.raises(ValueError, match="at least one"):
        mean_score([])


def test_a_proportion_has_wilsons_interval() -> None:
    """Numbers of Newcombe (1998, Table I, method 3), three digits and more."""
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        score = mean_score(np.arange(n) < right)
        assert (score["low"], score["high"]) == pytest.approx((low, high), abs=5e-5)
        other = mean_score(np.arange(n) >= right)
        assert (1 - other["high"], 1 - other["low"]) == pytest.approx((low, high), abs=5e-5)
    assert mean_score([0.0] * 9)["low"] == 0 and mean_score([1.0] * 9)["high"] == 1


def test_other_means_keep_the_bootstrap() -> None:
    values = np.random.default_rng(0).random(400)
    score = mean_score(values)
    assert score["high"] - score["low"] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    still = mean_score([0.5] * 9)
    assert still["low"] == still["high"] == 0.5


def test_a_standard_error_makes_an_interval() -> None:
    score = error_score(2.0, 0.5, 40, model="m", resamples=9, seed=0)
    assert (score["low"], score["high"]) == pytest.approx((2 - 0.98, 2 + 0.98), rel=1e-4)
    assert score["n"] == 40 and score["model"] == "m" and "resamples" not in score

import numpy as np
import pytest

from eval.interval import mean_score, normal_score


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        score = mean_score(rng.random(100) < 0.8, resamples=300, seed=trial)
        inside += score["low"] <= 0.8 <= score["high"]
    assert 0.88 <= inside / 200 <= 0.99


def test_score_says_what_it_is() -> None:
    score = mean_score([0.0, 1.0, 1.0, 1.0], model="coin", seed=3)
    assert score["value"] == 0.75 and score["n"] == 4 and score["model"] == "coin"
    assert score["low"] < 0.75 < score["high"] <= 1
    assert score == mean_score([0.0, 1.0, 1.0, 1.0], model="coin", seed=3)
    with pytest.raises(ValueError, match="at least one"):
        mean_score([])


def test_normal_interval_has_the_width_of_the_standard_error() -> None:
    values = np.random.default_rng(1).standard_normal(400)
    score = normal_score(float(values.mean()), 400, lambda i: float(values[i].mean()))
    assert (score["high"] - score["low"]) / 2 == pytest.approx(1.96 / 20, rel=0.15)
    assert score["value"] == pytest.approx((score["high"] + score["low"]) / 2)

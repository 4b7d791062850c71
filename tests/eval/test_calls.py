"""Network calls as a score."""

import pytest

from eval.calls import SHOWN, score_calls
from eval.scorers import METRICS


def test_the_mean_and_the_spread() -> None:
    scores = score_calls([4, 6, 8, 6], prefix="eval")
    mean, spread = scores["eval/network_calls"], scores["eval/network_calls/spread"]
    assert mean["value"] == 6 and mean["low"] < 6 < mean["high"] and mean["n"] == 4
    assert spread["value"] == pytest.approx(2**0.5)


def test_a_fixed_number_has_no_spread() -> None:
    assert set(score_calls([12] * 5, prefix="superres")) == {"superres/network_calls"}
    one = score_calls([1, 1], prefix="x")["x/network_calls"]
    assert one == {"value": 1, "low": 1, "high": 1, "n": 2}


def test_it_is_shown() -> None:
    assert METRICS["network_calls"].better == "lower" and set(SHOWN) <= set(METRICS)

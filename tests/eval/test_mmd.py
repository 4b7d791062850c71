"""KID and CMMD against golden numbers, a plain double loop, and the truth they estimate."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from eval import mmd
from eval.mmd import cubic, draws, gaussian, kid, score_cmmd, score_kid, unit
from eval.rows import Measured


@pytest.mark.golden
def test_golden_kid(golden: Callable) -> None:
    case = golden("evaluation/kid")
    x, y = case.io["feats1"], case.io["feats2"]
    tolerance = case.tolerance["kid"]["rtol"]
    subsets = zip(case.io["subset_idx1"], case.io["subset_idx2"], strict=True)
    values, _ = kid(x, y, subsets)
    torch.testing.assert_close(values, case.io["kid_per_subset"], rtol=tolerance, atol=1e-12)
    assert float(values.mean()) == pytest.approx(float(case.io["kid_mean"]), rel=tolerance)
    spread = float(values.std(correction=0))
    assert spread == pytest.approx(float(case.io["kid_std"]), rel=tolerance)
    n = min(len(x), len(y))
    for kind in ("unbiased", "biased"):
        value, *_ = mmd.mmd(x[:n].double(), y[:n].double(), cubic, kind == "unbiased")
        assert value == pytest.approx(float(case.io[f"mmd_{kind}_full"]), rel=tolerance)


@pytest.mark.golden
def test_golden_cmmd(golden: Callable) -> None:
    case = golden("evaluation/cmmd")
    tolerance = case.tolerance["float64"]["rtol"]
    scale = case.config["scale"]
    for names, expected in ((("emb1", "emb2"), "cmmd"), (("raw1", "raw2"), "cmmd_raw")):
        x, y = (case.io[name].double() for name in names)
        value, *_ = mmd.mmd(x, y, gaussian, unbiased=False)
        assert scale * value == pytest.approx(float(case.io[expected]), rel=tolerance)
    x, y = (case.io[name].double() for name in ("emb1", "emb2"))
    near = case.tolerance["float32"]["atol"]
    assert scale * mmd.mmd(x, y, gaussian, False)[0] == pytest.approx(
        float(case.io["cmmd_float32"]), abs=near
    )
    assert abs(scale * mmd.mmd(x, x, gaussian, unbiased=False)[0]) < 1e-9


def rows(n: int, seed: int, shift: float = 0.0, d: int = 6) -> torch.Tensor:
    draw = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draw + shift


@pytest.mark.parametrize("kernel", [cubic, gaussian])
@pytest.mark.parametrize("unbiased", [True, False])
def test_blocks_change_nothing(kernel, unbiased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value and every row's influence, by a loop over pairs."""
    x, y = rows(11, 0), rows(8, 1, 0.5)
    monkeypatch.setattr(mmd, "BLOCK", 4)
    value, of_x, of_y = mmd.mmd(x, y, kernel, unbiased)

    def mean(a: torch.Tensor, b: torch.Tensor, i: int, own: bool) -> float:
        others = [j for j in range(len(b)) if not (own and unbiased and i == j)]
        return sum(float(kernel(a[i : i + 1], b[j : j + 1])) for j in others) / len(others)

    expected = [mean(x, x, i, True) - mean(x, y, i, False) for i in range(len(x))]
    np.testing.assert_allclose(of_x, expected, rtol=1e-12, atol=1e-12)
    other = [mean(y, y, i, True) - mean(y, x, i, False) for i in range(len(y))]
    np.testing.assert_allclose(of_y, other, rtol=1e-12, atol=1e-12)
    assert value == pytest.approx(np.mean(expected) + np.mean(other), rel=1e-12)


def measured(features: torch.Tensor, model: str = "m") -> Measured:
    return Measured({"features": features.float().numpy()}, models={"features": model})


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """KID of normal features shifted by s in every place, whose moments are known."""
    d, shift = 2, 0.5
    x, y = rows(200_000, 5, d=d), rows(200_000, 6, shift, d)
    # E k(x, y) over independent pairs, from a sample large enough to be the truth here
    truth = sum(
        float(((a * b).sum(1) / d + 1).pow(3).mean()) * weight
        for a, b, weight in ((x, x.roll(1, 0), 1), (y, y.roll(1, 0), 1), (x, y, -2))
    )
    inside = 0
    for trial in range(60):
        made, real = rows(60, 100 + trial, shift, d), rows(60, 900 + trial, 0.0, d)
        score = score_kid(measured(made), [], measured(real), prefix="eval", seed=0)[0]
        inside += score["eval/kd_scenes"]["low"] <= truth <= score["eval/kd_scenes"]["high"]
    assert inside >= 51


def test_scores_say_what_they_are_and_repeat() -> None:
    made, real = measured(rows(30, 0, 1.0)), measured(rows(40, 1))
    for score, name in ((score_kid, "kd_scenes"), (score_cmmd, "mmd_scenes")):
        first, verdicts = score(made, [], real, prefix="eval", resamples=9, seed=3)
        assert list(first) == [f"eval/{name}"] and verdicts == [{}] * 30
        one = first[f"eval/{name}"]
        assert one["low"] < one["value"] < one["high"] and one["n"] == 30
        assert one["model"] == "m" and one["reference"] == "40 pictures"
        again = score(made, [], real, prefix="eval", resamples=9, seed=3)[0]
        assert again == first
        same = score(real, [], measured(rows(40, 2)), prefix="eval")[0][f"eval/{name}"]
        assert same["value"] < one["low"]
    assert [a.tolist() for a, _ in draws(9, 5, 1)] == [a.tolist() for a, _ in draws(9, 5, 1)]
    assert all(len(set(b.tolist())) == 5 for _, b in draws(9, 5, 1))


def test_what_cannot_be_compared_is_refused() -> None:
    made = measured(rows(5, 0))
    with pytest.raises(ValueError, match="name a reference"):
        score_kid(made, [], None, prefix="eval")
    with pytest.raises(ValueError, match="do not compare"):
        score_kid(made, [], measured(rows(5, 1), "other"), prefix="eval")
    with pytest.raises(ValueError, match="no features of both"):
        score_kid(made, [], Measured({"index": np.zeros(5)}), prefix="eval")
    with pytest.raises(ValueError, match="at least 2"):
        score_cmmd(measured(rows(1, 0)), [], made, prefix="eval")


def test_unit_vectors_keep_their_direction() -> None:
    x = rows(4, 3)
    torch.testing.assert_close(unit(3 * x), unit(x))
    torch.testing.assert_close(unit(x).norm(dim=1), torch.ones(4, dtype=torch.float64))

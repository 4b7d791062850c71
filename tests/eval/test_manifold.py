"""Neighbourhoods against golden numbers, plain definitions, and cases with a known answer."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from eval import manifold
from eval.manifold import drawn, nearest_l1, neighbourhoods, radii, score_giqa, score_manifold
from eval.rows import Measured

NAMES = ("precision", "recall", "density", "coverage")


@pytest.mark.golden
def test_golden_neighbourhoods(golden: Callable) -> None:
    case = golden("evaluation/prdc")
    real, fake = (case.io[name].double() for name in ("real", "fake"))
    ks = case.config["nearest_k"]
    for strict in (True, False):  # without ties both conventions agree
        for k, found in zip(ks, neighbourhoods(real, fake, ks, strict), strict=True):
            for name in NAMES:
                expected = float(case.io[f"k{k}.{name}"])
                assert float(found[name].mean()) == pytest.approx(expected, rel=1e-12)
    for name, rows in (("real", real), ("fake", fake)):
        for k, found in zip(ks, radii(rows, ks), strict=True):
            torch.testing.assert_close(
                found.sqrt(),
                case.io[f"k{k}.radii_{name}"].double(),
                rtol=case.tolerance["radii"]["rtol"],
                atol=0,
            )


def rows(n: int, seed: int, d: int = 3) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_blocks_and_plain_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake, k = rows(23, 0), 0.8 * rows(17, 1) + 0.8, 2
    monkeypatch.setattr(manifold, "BLOCK", 5)
    (found,) = neighbourhoods(real, fake, [k])

    def ball(a: torch.Tensor) -> list[float]:
        return [sorted((a - x).norm(dim=1).tolist())[k] for x in a]  # place 0 is the row itself

    of_real, of_fake = ball(real), ball(fake)
    gap = (fake[:, None] - real[None]).norm(dim=2)  # [17, 23]
    holds = gap < torch.tensor(of_real).double().double()
    assert found["precision"].tolist() == holds.any(1).double().tolist()
    np.testing.assert_allclose(found["density"], holds.sum(1).double() / k)
    assert found["coverage"].tolist() == holds.any(0).double().tolist()
    assert (
        found["recall"].tolist()
        == (gap.T < torch.tensor(of_fake).double()).any(1).double().tolist()
    )
    assert 0 < found["precision"].mean() < 1 and 0 < found["recall"].mean() < 1


def test_a_border_is_inside_or_outside_by_convention() -> None:
    line = torch.arange(6.0, dtype=torch.float64)[:, None]
    far = torch.tensor([[9.0], [19.0], [29.0]], dtype=torch.float64)
    far[0] = 6.0  # from 5, the last ball with k = 1 reaches to 6
    (strict,) = neighbourhoods(line, far, [1], strict=True)
    (loose,) = neighbourhoods(line, far, [1], strict=False)
    assert strict["precision"].tolist() == [0, 0, 0] and loose["precision"].tolist() == [1, 0, 0]


def measured(features: torch.Tensor) -> Measured:
    return Measured({"features": features.float().numpy()}, models={"features": "m"})


def test_a_collapsed_generator_is_precise_and_covers_nothing() -> None:
    real = rows(300, 0)
    fake = real[:1] + 1e-3 * rows(300, 1)
    scores, verdicts = score_manifold(
        measured(fake), [], measured(real), prefix="eval", resamples=20, seed=0
    )
    assert list(scores) == [f"eval/{name}_scenes" for name in NAMES] and len(verdicts) == 300
    assert (
        scores["eval/precision_scenes"]["value"] == 1 and scores["eval/precision_scenes"]["k"] == 3
    )
    assert scores["eval/recall_scenes"]["value"] < 0.02
    assert scores["eval/coverage_scenes"]["value"] < 0.1
    assert scores["eval/coverage_scenes"]["k"] == 5
    assert scores["eval/coverage_scenes"]["reference"] == "300 real pictures"


def test_both_sides_are_cut_to_one_n_by_a_seeded_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "MOST", 40)
    made, real = measured(rows(90, 0)), measured(rows(60, 1))
    one, again, other = (
        score_manifold(made, [], real, prefix="eval", resamples=5, seed=s)[0] for s in (0, 0, 1)
    )
    assert one == again != other
    assert {score["n"] for score in one.values()} == {40}
    assert torch.equal(drawn(np.eye(4), 4, 0), torch.eye(4, dtype=torch.float64))
    few = drawn(np.arange(50.0)[:, None], 20, 0)[:, 0].tolist()
    assert len(set(few)) == 20 and few == sorted(few) and few != list(range(20))


def test_quality_and_diversity_are_the_nearest_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "BLOCK", 4)
    x, y = rows(9, 0), rows(14, 1)
    gaps = (x[:, None] - y[None]).abs().sum(2)
    of_x, of_y = nearest_l1(x, y)
    torch.testing.assert_close(of_x, gaps.min(1).values)
    torch.testing.assert_close(of_y, gaps.min(0).values)
    near, far = measured(rows(80, 2)), measured(3 * rows(80, 3))
    real = measured(rows(80, 4))
    good, bad = (
        score_giqa(m, [], real, prefix="eval", resamples=5, seed=0)[0] for m in (near, far)
    )
    assert list(good) == ["eval/qs_relative_scenes", "eval/ds_relative_scenes"]
    assert all(good[name]["value"] > bad[name]["value"] for name in good)
    copies = score_giqa(real, [], real, prefix="eval", resamples=5, seed=0)[0]
    assert all(np.isfinite(score["value"]) for score in copies.values())


def test_too_few_pictures_are_named() -> None:
    with pytest.raises(ValueError, match="need more of them on either side, got 9 real and 5"):
        neighbourhoods(rows(9, 0), rows(5, 1), [3, 5])

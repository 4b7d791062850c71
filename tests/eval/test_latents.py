"""Smoothness and compression of latents against closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from data.scenes import scenes
from eval.classifier import load_classifier
from eval.classifier_network import Classifier
from eval.frechet import FeatureStats, frechet_distance, frechet_score
from eval.latents import (
    compression,
    compression_rows,
    latent_noise,
    ratio_score,
    regions,
    score_compression,
    score_smoothness,
)
from eval.reconstruction_scores import smoothness_rows
from eval.rows import Measured, joined


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_regions(a: float, b: float, c: float, d: float) -> tuple[Tensor, Tensor]:
    """A picture of 4 x 4 tokens: the upper half c +- a, the lower half d +- b, in 3 channels."""
    signs = torch.tensor([1.0, -1.0]).repeat(2, 2)
    upper, lower = c + a * signs[0], d + b * signs[0]
    grid = torch.stack([upper, upper, lower, lower])  # [4, 4]
    labels = torch.tensor([0, 0, 1, 1])[:, None].expand(4, 4)
    return grid.expand(1, 3, 4, 4), labels[None]


def test_spread_and_separation_have_their_closed_form() -> None:
    found = regions(*two_regions(0.5, 1.5, c=2.0, d=-1.0))
    assert found.counts.tolist() == [[8, 8]]
    torch.testing.assert_close(found.spreads, torch.tensor([[0.25, 2.25]]).double())
    terms = compression(found)
    assert [float(x) for x in terms["sigma2"]] == pytest.approx([2.5, 2])
    assert [float(x) for x in terms["rho"]] == pytest.approx([9 / 1.25, 1])


def test_regions_that_are_too_small_or_flat_do_not_count() -> None:
    latents, labels = two_regions(0.5, 1.5, 2.0, -1.0)
    labels = labels.clone()
    labels[0, 0, 0] = -1  # belongs to nothing: region 0 has 7 tokens left
    terms = compression(regions(latents, labels), least=8)
    assert [float(x) for x in terms["sigma2"]] == pytest.approx([2.25, 1])
    assert [float(x) for x in terms["rho"]] == [0, 0]
    flat = compression(regions(*two_regions(0.0, 0.0, 2.0, -1.0)))
    assert [float(x) for x in flat["sigma2"]] == pytest.approx([0, 2], abs=1e-20)
    assert [float(x) for x in flat["rho"]] == [0, 0]


def test_compression_ignores_shift_and_rotation_of_the_channels() -> None:
    z = torch.randn(5, 6, 8, 8, generator=rng())
    labels = torch.randint(-1, 4, (5, 8, 8), generator=rng(1))
    turn = torch.linalg.qr(torch.randn(6, 6, generator=rng(2)))[0]
    turned = torch.einsum("cd,ndhw->nchw", turn, z) + 3
    one, two = (compression(regions(x, labels), least=2) for x in (z, turned))
    for name in ("sigma2", "rho"):
        for a, b in zip(one[name], two[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # independent tokens of variance 1 in regions of n: the expected spread is 1 - 1/n
    counts = regions(z, labels).counts
    expected = float((1 - 1 / counts).mean())
    sums, numbers = one["sigma2"]
    assert float(sums.sum() / numbers.sum()) == pytest.approx(expected, abs=0.1)


def drawn(count: int) -> list[dict]:
    return list(scenes("val", count))


def test_scenes_give_the_masks() -> None:
    """Latents that are the number of the thing, plus noise: sigma^2 is the noise, rho the gaps."""
    shown = [s["attributes"] for s in drawn(40)]
    side, noise = 16, 0.1
    from data.scene_drawing import scene_masks

    things = np.stack([scene_masks(a, 32, side)[0] for a in shown])
    assert set(np.unique(things)) == {0, 1, 2}
    signal = torch.from_numpy(things)[:, None].expand(-1, 4, -1, -1).float()
    latents = signal + noise * torch.randn(signal.shape, generator=rng())
    halves = [compression_rows(latents[i : i + 20], shown[i : i + 20], 32) for i in (0, 20)]
    scores = score_compression(joined(halves), prefix="eval", resamples=20)
    assert scores == score_compression(
        compression_rows(latents, shown, 32), prefix="eval", resamples=20
    )
    names = {f"eval/{n}_{level}" for n in ("sigma2", "rho") for level in ("object", "part")}
    assert scores.keys() == names
    n = np.bincount(things.ravel() + 3 * np.repeat(np.arange(40), side * side)).reshape(40, 3)
    expected = noise**2 * float((1 - 1 / n).mean())
    assert scores["eval/sigma2_object"]["value"] == pytest.approx(expected, rel=0.1)
    # gaps of 1, 1 and 2 between the three regions: (1 + 1 + 4) / 3 over the variance
    assert scores["eval/rho_object"]["value"] == pytest.approx(2 / noise**2, rel=0.15)
    assert noise**2 * 0.75 < scores["eval/sigma2_part"]["value"] < noise**2  # few tokens each
    assert scores["eval/rho_part"]["value"] < 1  # nothing separates the halves of a thing
    score = scores["eval/sigma2_object"]
    assert score["low"] < score["value"] < score["high"] and score["n"] == 40
    assert score["terms"] == 120 and "at least 3 of 16x16 tokens" in score["model"]
    fewer, none = (
        score_compression(compression_rows(latents, shown, 32, least), prefix="eval", resamples=9)
        for least in (20, 99)
    )
    assert fewer["eval/sigma2_object"]["terms"] < 120 and "eval/sigma2_part" not in none
    with pytest.raises(ValueError, match="do not pair up"):
        compression_rows(latents, shown[1:], 32)


def test_the_mean_over_groups_weighs_terms_not_groups() -> None:
    sums, numbers = np.array([6.0, 0.0, 1.0]), np.array([3.0, 0.0, 1.0])
    score = ratio_score(sums, numbers, resamples=50, note="x")
    assert score["value"] == 7 / 4 and score["n"] == 2 and score["terms"] == 4
    assert 1 <= score["low"] <= score["high"] <= 2 and score["note"] == "x"


def test_noise_depends_on_seed_and_place_alone() -> None:
    latents = torch.zeros(5, 3, 4, 4)
    whole = latent_noise(latents, 0, 7)
    parts = [latent_noise(latents[:2], 0, 7), latent_noise(latents[2:], 2, 7)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(latent_noise(latents, 0, 8), whole) and abs(float(whole.std()) - 1) < 0.2


def test_smoothness_of_the_identity_is_that_of_the_noise() -> None:
    """Twice the pictures as latents: PSNR is known, and at level 0 nothing differs."""
    grey = np.stack([np.rint((s["image"] - 127.5) * 0.3 + 127.5) for s in drawn(24)])
    images = torch.from_numpy(grey).permute(0, 3, 1, 2).to(torch.uint8)
    latents, levels = 2 * (images.float() / 127.5 - 1), (0.0, 0.05, 0.3)

    def made(size: int, classifier: Classifier | None = None) -> dict[str, dict]:
        noise, parts = latent_noise(latents, 0, 0), []
        for z, n, x in zip(*(t.split(size) for t in (latents, noise, images)), strict=True):
            rows = smoothness_rows(lambda z: z / 2, z, n, x, levels, classifier)
            models = {"features": "m"} if classifier else {}
            parts.append(Measured({k: v.numpy() for k, v in rows.items()}, models=models))
        return score_smoothness(joined(parts), prefix="eval", resamples=20, seed=0)

    classifier = load_classifier()
    scores = made(24, classifier)
    names = [
        "eval/rfd_scenes",
        "eval/rfd_scenes/noise=0.05",
        "eval/psnr/noise=0.05",
        "eval/rfd_scenes/noise=0.3",
        "eval/psnr/noise=0.3",
    ]
    assert list(scores) == names and scores[names[1]]["noise"] == 0.05
    assert abs(scores[names[0]]["value"]) < 1e-4
    assert scores[names[1]]["value"] < scores[names[3]]["value"]
    assert scores[names[3]]["low"] < scores[names[3]]["value"] < scores[names[3]]["high"]
    for level in (0.05, 0.3):  # the error in [0, 1] has the standard deviation e / 4
        expected = -20 * math.log10(level / 4)
        assert scores[f"eval/psnr/noise={level}"]["value"] == pytest.approx(expected, abs=0.2)
    again = made(5, classifier)
    assert [again[n]["value"] for n in names] == pytest.approx(
        [scores[n]["value"] for n in names], rel=1e-4, abs=1e-4
    )
    assert list(made(24)) == ["eval/psnr/noise=0.05", "eval/psnr/noise=0.3"]
    with pytest.raises(ValueError, match="at least 2"):
        score_smoothness(
            Measured({"psnr/noise=0.1": np.ones(1)}), prefix="eval", resamples=2, seed=0
        )


def test_paired_distances_move_with_their_originals() -> None:
    real = torch.randn(60, 3, generator=rng()).numpy()
    same = frechet_score(real, real, paired=True)
    assert max(abs(same[k]) for k in ("value", "low", "high")) < 1e-9
    moved = frechet_score(real + 2, real, paired=True, model="m")
    assert moved["value"] == pytest.approx(12) and moved["low"] == pytest.approx(12)
    twice, once = (FeatureStats.of(torch.from_numpy(x).double()) for x in (2 * real, real))
    expected = frechet_distance(twice, once)
    assert frechet_score(2 * real, real, paired=True)["value"] == pytest.approx(expected)

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.scenes import scenes
from eval.extractors import ReconstructionRows, SceneRows
from eval.reconstruction_scores import codebook_use, lpips_name, psnr, score_reconstruction, ssim
from eval.rows import Measured, joined
from experiments.papers.base import LPIPS_SCENES
from lightning_modules.common.perceptual import LPIPS


@pytest.mark.golden
def test_golden_psnr_and_ssim(golden: Callable) -> None:
    case = golden("evaluation/recon_metrics")
    real, made = (case.io[k].permute(0, 3, 1, 2) / 255 for k in ("real", "recon"))
    data_range = case.config["data_range"]
    rel = case.tolerance["psnr"]["rtol"]
    atol = case.tolerance["ssim"]["atol"]
    torch.testing.assert_close(psnr(real, made, data_range), case.io["psnr"], rtol=rel, atol=0)
    for window, name in (("uniform", "ssim_uniform7"), ("gaussian", "ssim_gaussian")):
        ours = ssim(real, made, data_range, window)
        torch.testing.assert_close(ours, case.io[name], rtol=0, atol=atol)
    wrong_range = ssim(real, made, 2.0)
    torch.testing.assert_close(wrong_range, case.io["ssim_range2"], rtol=0, atol=atol)


def test_equal_pictures() -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert psnr(images, images).isinf().all()
    torch.testing.assert_close(ssim(images, images), torch.ones(2).double())
    with pytest.raises(ValueError, match="at least 7x7"):
        ssim(images[..., :6], images[..., :6])
    with pytest.raises(ValueError, match="uniform or gaussian"):
        ssim(images, images, window="box")


def test_psnr_of_a_known_error() -> None:
    zero = torch.zeros(1, 3, 8, 8)
    assert float(psnr(zero, zero + 0.1)) == pytest.approx(20)
    assert float(psnr(zero, zero + 0.1, data_range=2)) == pytest.approx(20 + 20 * math.log10(2))


def test_codebook_use() -> None:
    usage, perplexity = codebook_use(torch.tensor([5, 5, 0, 0]))
    assert usage == 0.5 and perplexity == pytest.approx(2)


class GreyTokenizer:
    """Means of 4x4 blocks, rounded to 16 greys."""

    num_codes = 16
    factor = 4

    def encode(self, images: Tensor) -> Tensor:
        grey = F.avg_pool2d(images.mean(1, keepdim=True), 4)
        return ((grey[:, 0] + 1) * 7.5).round().long()

    def decode(self, tokens: Tensor) -> Tensor:
        grey = (tokens / 7.5 - 1)[:, None].expand(-1, 3, -1, -1)
        return F.interpolate(grey, scale_factor=4)

    def codebook(self) -> Tensor:
        return torch.linspace(-1, 1, 16)[:, None]


def measured(
    first_stage: Any, images: Tensor, size: int, asked: list[dict] | None = None, **fields: Any
) -> Measured:
    measure = ReconstructionRows(**fields).load(
        "cpu", folder=Path("unused"), first_stage=first_stage
    )
    asked = asked or [{}] * len(images)
    parts = [slice(i, i + size) for i in range(0, len(images), size)]
    return joined([measure(images[part], asked[part], part.start) for part in parts])


def scores_of(made: Measured, asked: list[dict] | None = None) -> dict[str, dict]:
    about = {"pictures": "as they are"}
    options: dict[str, Any] = {"prefix": "eval", "resamples": 20, "seed": 0, **about}
    return score_reconstruction(made, asked or [{}] * len(made), None, **options)[0]


def test_scores_of_a_tokenizer_do_not_depend_on_the_batches() -> None:
    levels = torch.tensor([0, 3, 12, 15]) * 17
    noise = torch.randint(0, 3, (4, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    images = (levels.view(4, 1, 1, 1) + noise).clamp(0, 255).to(torch.uint8)
    whole = measured(GreyTokenizer(), images, 4, show=3)
    one, two = (scores_of(m) for m in (whole, measured(GreyTokenizer(), images, 3, show=3)))
    assert one == two
    assert whole.sums["codes"].tolist() == [16 if i in (0, 3, 12, 15) else 0 for i in range(16)]
    assert one["eval/codebook_usage"]["value"] == 4 / 16
    assert one["eval/codebook_perplexity"]["value"] == pytest.approx(4)
    psnr_score = one["eval/psnr"]
    assert 30 < psnr_score["low"] <= psnr_score["value"] <= psnr_score["high"] <= 100
    assert psnr_score["n"] == 4 and "PSNR" in psnr_score["model"]
    assert all(score["pictures"] == "as they are" for score in one.values())
    with pytest.raises(ValueError, match="need the first stage"):
        ReconstructionRows().load("cpu", folder=Path("unused"))


@pytest.mark.parametrize("size", [2, 3])
def test_as_many_pairs_are_shown_as_asked(size: int) -> None:
    images = torch.arange(5 * 3 * 64).reshape(5, 3, 8, 8).remainder(256).to(torch.uint8)
    shown = measured(Dimmed(), images, size, show=3).shown
    assert shown is not None and shown.shape == (3, 2, 3, 8, 8)
    np.testing.assert_array_equal(shown[:, 0], images[:3])
    np.testing.assert_array_equal(shown[:, 1], (images[:3].int() - 32).clamp(0))  # 31.875 levels
    assert measured(Dimmed(), images, size).shown is None


class Dimmed:
    """A continuous autoencoder that keeps all but a little of the brightness."""

    factor = 1

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents - 0.25


def test_a_continuous_autoencoder_has_no_codebook(monkeypatch: pytest.MonkeyPatch) -> None:
    images, seen = torch.full((3, 3, 8, 8), 128, dtype=torch.uint8), []

    class Quarter(LPIPS):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            seen.append((float(x.mean()), float(y.mean())))
            return torch.full((len(x),), 0.25)

    where = "lightning_modules.common.perceptual.load_lpips"
    monkeypatch.setattr(where, lambda path: Quarter((8,) * 5))
    made = measured(Dimmed(), images, 2, lpips=LPIPS_SCENES)
    assert not made.sums
    scores = scores_of(made)
    assert list(scores) == [f"eval/{n}" for n in ("psnr", "ssim", "l1", "mse", "lpips_scenes")]
    step = 32 / 255  # 0.25 is 31.875 levels of 255
    assert scores["eval/l1"]["value"] == pytest.approx(step, rel=1e-6)
    assert scores["eval/mse"]["value"] == pytest.approx(step**2, rel=1e-6)
    assert scores["eval/psnr"]["value"] == pytest.approx(-20 * math.log10(step), rel=1e-6)
    assert scores["eval/lpips_scenes"]["value"] == 0.25 and scores["eval/lpips_scenes"]["n"] == 3
    one = 1 / 255
    assert seen == [(pytest.approx(one, rel=1e-4), pytest.approx(one - 0.25, rel=1e-4))] * 2


def test_only_vgg16_is_called_lpips() -> None:
    assert lpips_name(LPIPS()) == "lpips" and lpips_name(LPIPS((8,) * 5)) == "lpips_scenes"


class Latents:
    """Pictures are their own latents, one per pixel."""

    factor = 1

    def encode(self, images: Tensor) -> Tensor:
        return images

    decode = encode


def test_every_score_of_an_autoencoder_of_scenes() -> None:
    samples = list(scenes("val", 12))
    images = torch.from_numpy(np.stack([s["image"] for s in samples])).permute(0, 3, 1, 2)
    fields: dict[str, Any] = {"levels": (0.0, 0.1), "compress": True, "seed": 3}
    fields["scenes"] = SceneRows.of(32, 2)
    scores, whole = (
        scores_of(measured(Latents(), images, size, samples, **fields), samples) for size in (5, 12)
    )
    names = ["psnr", "ssim", "l1", "mse", "scene_accuracy"]
    names += [f"scene_accuracy/{p}" for p in ("color", "shape", "size", "relation", "background")]
    names += ["scene_atoms", "rfd_scenes", "rfd_scenes/noise=0.1", "psnr/noise=0.1"]
    names += ["sigma2_object", "rho_object", "sigma2_part", "rho_part"]
    assert list(scores) == [f"eval/{n}" for n in names]
    assert scores["eval/psnr"]["value"] == 100 and scores["eval/scene_accuracy"]["value"] == 1
    assert abs(scores["eval/rfd_scenes"]["value"]) < 1e-3
    assert whole["eval/psnr/noise=0.1"] == scores["eval/psnr/noise=0.1"]

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.reconstruction import codebook_use, psnr, score_reconstructions, ssim


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


def test_scores_of_a_tokenizer_do_not_depend_on_the_batches() -> None:
    levels = torch.tensor([0, 3, 12, 15]) / 7.5 - 1
    flat = levels.view(4, 1, 1, 1).expand(4, 3, 16, 16).clone()
    noise = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 0.02
    images = (flat + noise).clamp(-1, 1)
    one = score_reconstructions(GreyTokenizer(), [images], resamples=50)
    two = score_reconstructions(GreyTokenizer(), images.split(3), resamples=50)
    assert one == two
    assert one["eval/codebook_usage"]["value"] == 4 / 16
    assert one["eval/codebook_perplexity"]["value"] == pytest.approx(4)
    psnr_score = one["eval/psnr"]
    assert 30 < psnr_score["low"] <= psnr_score["value"] <= psnr_score["high"] <= 100
    assert psnr_score["n"] == 4 and "PSNR" in psnr_score["model"]
    with pytest.raises(ValueError, match="at least one picture"):
        score_reconstructions(GreyTokenizer(), [])


class Dimmed:
    """A continuous autoencoder that keeps all but a little of the brightness."""

    factor = 1

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents - 0.2


def test_a_continuous_autoencoder_has_no_codebook() -> None:
    images = torch.zeros(3, 3, 8, 8)
    seen = []

    def lpips(real: Tensor, made: Tensor) -> Tensor:
        seen.append((float(real.mean()), float(made.mean())))
        return torch.full((len(real), 1, 1, 1), 0.25)

    scores = score_reconstructions(Dimmed(), images.split(2), lpips=lpips, resamples=10)
    assert list(scores) == [f"eval/{n}" for n in ("psnr", "ssim", "l1", "mse", "lpips")]
    step = 26 / 255  # 0 becomes 128 of 255, -0.2 becomes 102
    assert scores["eval/l1"]["value"] == pytest.approx(step, rel=1e-6)
    assert scores["eval/mse"]["value"] == pytest.approx(step**2, rel=1e-6)
    assert scores["eval/psnr"]["value"] == pytest.approx(-20 * math.log10(step), rel=1e-6)
    assert scores["eval/lpips"]["value"] == 0.25 and scores["eval/lpips"]["n"] == 3
    assert seen == [(0.0, pytest.approx(-0.2))] * 2

"""How well a first stage gives pictures back, and how it uses its codebook or its latents."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.scene_captions import AskedScene
from data.scene_drawing import Scene
from eval.classifier_network import Classifier
from eval.interval import Scored, mean_score
from eval.latents import (
    NOISE,
    compression_rows,
    latent_noise,
    score_compression,
    score_smoothness,
)
from eval.metric import Metric
from eval.rows import Asked, Measure, Measured
from eval.scenes import score_labels
from lightning_modules.common.perceptual import LPIPS, VGG_WIDTHS

SHOWN = {
    "psnr": Metric("PSNR", "dB", better="higher"),
    "ssim": Metric("SSIM", "structural similarity, at most 1", better="higher"),
    "l1": Metric("L1", "mean absolute error of pictures in [0, 1]", better="lower"),
    "mse": Metric("MSE", "mean squared error of pictures in [0, 1]", better="lower"),
    "lpips": Metric("LPIPS", "perceptual distance in VGG16", better="lower"),
    "lpips_scenes": Metric(
        "LPIPS scenes", "distance in LPIPS's form, in a small network of scenes", better="lower"
    ),
    "codebook_usage": Metric("Codebook usage", "codes that occur at all", better="higher"),
    "codebook_perplexity": Metric("Codebook perplexity", "codes in effective use", better="higher"),
}
MEANS = {
    "psnr": "PSNR, dB, 8 bit, at most 100",
    "ssim": "SSIM, 7x7 uniform window",
    "l1": "mean absolute error, pictures in [0, 1], 8 bit",
    "mse": "mean squared error, pictures in [0, 1], 8 bit",
    "lpips": "LPIPS (VGG16), pictures in [-1, 1]",
    "lpips_scenes": "distance in LPIPS's form, in a small network that learnt to read scenes",
}


def reconstruction_measure(
    first_stage: Any,
    lpips: LPIPS | None,
    classifier: Classifier | None,
    *,
    show: int,
    levels: Sequence[float],
    compress: bool,
    seed: int,
    device: torch.device | str,
) -> Measure:
    """Return what makes the rows of `ReconstructionRows`, whose fields these are."""
    num_codes: int | None = getattr(first_stage, "num_codes", None)

    @torch.no_grad()
    def measure(images: Tensor, asked: Asked, first: int) -> Measured:
        images = images.to(device)
        pixels = images.float() / 127.5 - 1
        encoded = first_stage.encode(pixels)  # tokens [B, h, w], or latents [B, C, h, w]
        decoded = first_stage.decode(encoded)
        made = to_eight_bit(decoded)
        rows, models = picture_rows(images, made), {}
        if lpips is not None:
            rows[lpips_name(lpips)] = lpips(pixels, decoded)
        if classifier is not None:
            rows["labels"] = classifier.read(made)[0].to(torch.int16)
            models["labels"] = classifier.name
        if levels:
            noise = latent_noise(encoded, first, seed) if any(levels) else encoded
            rows |= smoothness_rows(first_stage.decode, encoded, noise, images, levels, classifier)
        if levels and classifier is not None:
            models["features"] = classifier.name
        found = {k: v.cpu().numpy() for k, v in rows.items()}
        if compress:
            shown = [a["attributes"] for a in asked]
            terms = compression_rows(encoded, shown, images.shape[-1])
            found, models = {**found, **terms.rows}, models | terms.models
        sums = {}
        if num_codes is not None:
            codes = torch.bincount(encoded.flatten().cpu(), minlength=num_codes)
            sums["codes"] = codes.numpy()
        pairs = torch.stack([images, made], dim=1)[: max(0, show - first)]
        return Measured(found, sums, pairs.cpu().numpy() if len(pairs) else None, models)

    return measure


def smoothness_rows(
    decode: Callable[[Tensor], Tensor],
    latents: Tensor,
    noise: Tensor,
    images: Tensor,
    levels: Sequence[float],
    classifier: Classifier | None = None,
) -> dict[str, Tensor]:
    """Measure reconstructions of latents to which noise was added, the same at all levels.

    Args:
        decode: latents [B, C, h, w] to images [B, 3, H, W] in [-1, 1].
        latents: [B, C, h, w] means of the posteriors, channels of unit standard deviation; or
            tokens [B, h, w], to which nothing can be added.
        noise: [B, C, h, w] standard normal.
        images: [B, 3, H, W] uint8 originals.
        levels: strengths of the noise.
        classifier: whose features span the space of the Frechet distance; None leaves that out.

    Returns:
        What `score_smoothness` reads.
    """
    rows = {} if classifier is None else {"features": classifier.read(images)[1]}
    for level in levels:
        made = to_eight_bit(decode(latents + level * noise if level else latents))
        if classifier is not None:
            rows[f"features{NOISE}{level:g}"] = classifier.read(made)[1]
        if level:  # without noise it is the PSNR of the reconstruction
            rows[f"psnr{NOISE}{level:g}"] = eight_bit_psnr(images, made)
    return rows


def lpips_name(lpips: LPIPS) -> str:
    """Return the name that a distance has earned: only VGG16's widths are LPIPS."""
    width = lpips.state_dict()["lin0.model.1.weight"].shape[1]
    return "lpips" if width == VGG_WIDTHS[0] else "lpips_scenes"


def psnr(real: Tensor, made: Tensor, data_range: float = 1.0) -> Tensor:
    """Return the peak signal-to-noise ratio of each picture, 10 log10(data_range^2 / MSE).

    Args:
        real: [N, C, H, W] float.
        made: [N, C, H, W] float.
        data_range: largest minus smallest possible value.

    Returns:
        [N] float64 in dB, inf where the pictures are equal.
    """
    error = (real.double() - made.double()).square().mean(dim=(1, 2, 3))  # [N]
    return 10 * torch.log10(data_range**2 / error)


def ssim(real: Tensor, made: Tensor, data_range: float = 1.0, window: str = "uniform") -> Tensor:
    """Return the structural similarity of each picture, averaged over windows and channels.

    ((2 mx my + c1)(2 sxy + c2)) / ((mx^2 + my^2 + c1)(sx^2 + sy^2 + c2)) with
    c1 = (0.01 range)^2, c2 = (0.03 range)^2 (Wang et al. 2004, eq. 13), over the windows that lie
    wholly inside the picture.

    Args:
        real: [N, C, H, W] float.
        made: [N, C, H, W] float.
        data_range: largest minus smallest possible value.
        window: "uniform" = 7x7 means with the sample covariance, scikit-image's default and what
            tokenizer papers report; "gaussian" = 11 taps of sigma 1.5 with the population
            covariance, as Wang et al.

    Returns:
        [N] float64.

    Raises:
        ValueError: an unknown window, or pictures smaller than it.
    """
    taps = {"uniform": 7, "gaussian": 11}.get(window)
    if taps is None:
        raise ValueError(f"window must be uniform or gaussian, got {window!r}")
    if min(real.shape[-2:]) < taps:
        raise ValueError(f"SSIM needs at least {taps}x{taps} pixels, got {list(real.shape[-2:])}")
    x, y = real.double(), made.double()
    channels = x.shape[1]
    offsets = torch.arange(taps, dtype=x.dtype, device=x.device) - taps // 2
    line = torch.exp(-0.5 * (offsets / 1.5) ** 2) if window == "gaussian" else offsets * 0 + 1
    line = line / line.sum()
    kernel = torch.outer(line, line).expand(channels, 1, taps, taps)

    def local_mean(z: Tensor) -> Tensor:
        return F.conv2d(z, kernel, groups=channels)

    unbias = taps**2 / (taps**2 - 1) if window == "uniform" else 1.0
    mx, my = local_mean(x), local_mean(y)  # [N, C, H - taps + 1, W - taps + 1]
    sxx = unbias * (local_mean(x * x) - mx * mx)
    syy = unbias * (local_mean(y * y) - my * my)
    sxy = unbias * (local_mean(x * y) - mx * my)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mx * my + c1) * (2 * sxy + c2)
    similarity = similarity / ((mx * mx + my * my + c1) * (sxx + syy + c2))
    return similarity.mean(dim=(1, 2, 3))


def codebook_use(counts: Tensor) -> tuple[float, float]:
    """Return usage and perplexity of a codebook over a whole evaluation set.

    Usage = codes that occur / K; perplexity = exp(-sum p log p) of the histogram of codes, between
    1 and K.

    Args:
        counts: [K] how often each code occurred.
    """
    p = counts.double() / counts.sum()
    entropy = -torch.xlogy(p, p).sum()
    return float((counts > 0).double().mean()), float(entropy.exp())


def picture_rows(real: Tensor, made: Tensor) -> dict[str, Tensor]:
    """Compare pictures [B, 3, H, W] uint8: psnr, ssim, l1 and mse, each [B] float64."""
    gap = (real.float() / 255 - made.float() / 255).double()
    return {
        "psnr": eight_bit_psnr(real, made),
        "ssim": ssim(real.float() / 255, made.float() / 255),
        "l1": gap.abs().mean(dim=(1, 2, 3)),
        "mse": gap.square().mean(dim=(1, 2, 3)),
    }


def eight_bit_psnr(real: Tensor, made: Tensor) -> Tensor:
    """Return the PSNR [B] of pictures [B, 3, H, W] uint8, at most the 100 dB of 8 bit."""
    # a picture that comes back exactly would have infinite PSNR
    return psnr(real.float() / 255, made.float() / 255).clamp(max=100)


def score_reconstruction(
    made: Measured, asked: Asked, reference: Measured | None, *, prefix: str, **what: Any
) -> Scored:
    """Score what comes back from a first stage.

    All scores but the codebook's are means of per-picture values. Captions say nothing of a first
    stage, and its pictures are the reference itself, so there are neither a CLIP score nor a
    distance that would not stand beside that of samples.

    Args:
        made: rows of `ReconstructionRows`, N pictures.
        asked: N times what is known of the originals, with "attributes" where labels were read.
        reference, prefix, what: see `eval.scorers.Scorer`.

    Returns:
        scores: `prefix`/psnr, /ssim, /l1, /mse, with LPIPS also /lpips or /lpips_scenes, with a
            codebook /codebook_usage and /codebook_perplexity; of scenes /scene_accuracy and its
            parts; where noise was added, be it of strength 0, those of eval/latents.py.
        verdicts: those of `score_labels`, or an empty one per picture.
    """
    about = {k: v for k, v in what.items() if k not in ("resamples", "seed")}
    scores = {
        f"{prefix}/{name}": mean_score(made.rows[name], model=f"mean of per-picture {mean}", **what)
        for name, mean in MEANS.items()
        if name in made.rows
    }
    if "codes" in made.sums:
        counts = torch.from_numpy(made.sums["codes"])
        usage, perplexity = codebook_use(counts)
        codes = {"low": None, "high": None, "n": len(made), "codes": len(counts), **about}
        model = "fraction of codes that occur in the set"
        scores[f"{prefix}/codebook_usage"] = {"value": usage, "model": model, **codes}
        model = "exp of the entropy of the code histogram"
        scores[f"{prefix}/codebook_perplexity"] = {"value": perplexity, "model": model, **codes}
    verdicts: list[dict[str, Any]] = [{} for _ in range(len(made))]
    if "labels" in made.rows:
        shown = [AskedScene.of(Scene.from_attributes(a["attributes"])) for a in asked]
        accuracies, verdicts = score_labels(made, shown, prefix=prefix, **what)
        scores |= accuracies
    if any(NOISE in name for name in made.rows):
        scores |= score_smoothness(made, prefix=prefix, **what)
    return {**scores, **score_compression(made, prefix=prefix, **what)}, verdicts


def to_eight_bit(images: Tensor) -> Tensor:
    """Round [-1, 1] to the 256 levels of a saved picture, uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

"""How well a tokenizer or a continuous autoencoder gives pictures back, and its codebook's use."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.interval import Score, mean_score
from lightning_modules.common.interfaces import Codec

MEANS = {
    "psnr": "PSNR, dB, 8 bit, at most 100",
    "ssim": "SSIM, 7x7 uniform window",
    "l1": "mean absolute error, pictures in [0, 1], 8 bit",
    "mse": "mean squared error, pictures in [0, 1], 8 bit",
    "lpips": "LPIPS (VGG16), pictures in [-1, 1]",
    "lpips_scenes": "distance in LPIPS's form, in a small network that learnt to read scenes",
}


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
    share = counts.double() / counts.sum()
    entropy = -torch.xlogy(share, share).sum()
    return float((counts > 0).double().mean()), float(entropy.exp())


@torch.no_grad()
def score_reconstructions(
    codec: Codec,
    batches: Iterable[Tensor],
    *,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    lpips_name: str = "lpips",
    device: torch.device | str = "cpu",
    resamples: int = 1000,
    seed: int = 0,
    prefix: str = "eval",
) -> dict[str, Score]:
    """Encode and decode pictures and score what comes back.

    Both sides are rounded to 8 bit and scaled to [0, 1] first, as when a picture is saved; LPIPS
    sees them as they are. All scores but the codebook's are means of per-picture values.

    Args:
        codec: encodes [B, 3, H, W] in [-1, 1] and decodes what comes out; with tokens of a
            codebook it has `num_codes`.
        batches: pictures [B, 3, H, W] float in [-1, 1], batch by batch.
        lpips: pictures [B, 3, H, W] and reconstructions in [-1, 1] to the distance [B]; None
            leaves LPIPS out.
        lpips_name: lpips, or lpips_scenes with the weights of eval/perceptual.py.
        device: where the codec and LPIPS live.
        resamples: bootstrap draws of the intervals.
        seed: seed of the bootstrap.
        prefix: put before the names.

    Returns:
        Scores `prefix`/psnr, /ssim, /l1, /mse, with `lpips` also `lpips_name`, and with a codebook
        /codebook_usage, /codebook_perplexity.

    Raises:
        ValueError: no pictures.
    """
    num_codes: int | None = getattr(codec, "num_codes", None)
    counts = torch.zeros(num_codes or 0, dtype=torch.int64)
    values: dict[str, list[Tensor]] = {}
    for images in batches:
        images = images.to(device)
        encoded = codec.encode(images)  # tokens [B, h, w], or latents [B, C, h, w]
        decoded = codec.decode(encoded)
        real, made = to_eight_bit(images), to_eight_bit(decoded)
        gap = (real - made).double()
        found = {
            # a picture that comes back exactly has infinite PSNR; 8 bit cannot say more than 100 dB
            "psnr": psnr(real, made).clamp(max=100),
            "ssim": ssim(real, made),
            "l1": gap.abs().mean(dim=(1, 2, 3)),
            "mse": gap.square().mean(dim=(1, 2, 3)),
        }
        if lpips is not None:
            found[lpips_name] = lpips(images, decoded)
        for name, row in found.items():
            values.setdefault(name, []).append(row.flatten().cpu())
        if num_codes is not None:
            counts += torch.bincount(encoded.flatten().cpu(), minlength=num_codes)
    if not values:
        raise ValueError("a tokenizer is scored on at least one picture, got none")
    scores = {
        f"{prefix}/{name}": mean_score(
            torch.cat(rows),
            resamples=resamples,
            seed=seed,
            model=f"mean of per-picture {MEANS[name]}",
        )
        for name, rows in values.items()
    }
    if num_codes is not None:
        usage, perplexity = codebook_use(counts)
        pictures = scores[f"{prefix}/psnr"]["n"]
        codes = {"n": pictures, "low": None, "high": None, "codes": num_codes}
        scores[f"{prefix}/codebook_usage"] = {
            "value": usage, **codes, "model": "share of codes that occur in the set"
        }  # fmt: skip
        scores[f"{prefix}/codebook_perplexity"] = {
            "value": perplexity, **codes, "model": "exp of the entropy of the code histogram"
        }  # fmt: skip
    return scores


def to_eight_bit(images: Tensor) -> Tensor:
    """Round [-1, 1] to the 256 levels of a saved picture, as numbers in [0, 1]."""
    return ((images + 1) * 127.5).round().clamp(0, 255) / 255

"""How latents are made: smooth under noise, compact within a thing, apart between things.

Latent smoothness: Frechet distance of reconstructions to their originals against the strength of
noise in the latents (LDMAE, arXiv 2507.09984, Fig. 6; robustness test of its released code), here
in the features of the scenes' classifier.

Perceptual compression (Fig. 7 there): sigma^2, the spread of latents within a region, and rho, how
far regions lie apart. The paper's formulas are published nowhere that could be reached; the
definition here is this project's own. With every channel divided by its standard deviation over
the data, and the C channels of the tokens of region k of a picture having mean mu_k and mean
squared distance to it v_k C:

    sigma^2 = mean of v_k over all regions of all pictures,
    rho = mean of |mu_i - mu_j|^2 / C / ((v_i + v_j) / 2) over all pairs of regions of a picture.

A token belongs to the region that holds its centre; regions of fewer than `least` tokens are left
out. At the level of objects the regions of a picture are its things and the background; at the
level of parts every thing is a picture of its own, whose regions are its upper and lower half.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.scene_drawing import scene_masks
from eval.frechet import frechet_score
from eval.interval import Score, mean_score
from eval.metric import Metric
from eval.rows import Measured
from lightning_modules.common.seeding import mix_seed

SHOWN = {
    "rfd_scenes": Metric(
        "rFD scenes",
        "Frechet distance of reconstructions to their originals in the classifier's features",
        better="lower",
    ),
    "sigma2_object": Metric(
        "sigma², objects", "spread of latents within a thing: how compact they are", better="lower"
    ),
    "rho_object": Metric("rho, objects", "how far things lie apart in latents", better="higher"),
    "sigma2_part": Metric("sigma², parts", "the same within half a thing", better="lower"),
    "rho_part": Metric("rho, parts", "the same between the halves of a thing", better="higher"),
}
PSNR = "mean of per-picture PSNR, dB, 8 bit, at most 100"
NOISE = "/noise="  # parts the name of rows and scores from the strength of the noise
NO_SPREAD = 1e-12  # of channels of unit variance: below it, rounding is all that is left


def latent_noise(latents: Tensor, first: int, seed: int) -> Tensor:
    """Draw standard normal noise like `latents` [B, C, h, w], of picture first + i by (seed, i)."""
    seeds = [mix_seed(seed, first + i) for i in range(len(latents))]
    sources = [torch.Generator().manual_seed(own) for own in seeds]
    return torch.stack([torch.randn(latents.shape[1:], generator=g) for g in sources]).to(latents)


def score_smoothness(
    made: Measured, *, prefix: str, resamples: int, **what: Any
) -> dict[str, Score]:
    """Score reconstructions of latents to which noise was added.

    Args:
        made: features [N, d] of the originals (or none) and, for every level E, features/noise=E
            [N, d] and psnr/noise=E [N] of the reconstructions, N >= 2.
        prefix: put before the names.
        resamples: bootstrap draws of the PSNR's interval.
        what: seed of the bootstrap, and what is stored beside every score.

    Returns:
        `prefix`/rfd_scenes/noise=E (with features) and `prefix`/psnr/noise=E for every level E;
        level 0 is called rfd_scenes alone and has no PSNR here.

    Raises:
        ValueError: fewer than 2 pictures.
    """
    if len(made) < 2:
        raise ValueError(f"the smoothness of latents needs at least 2 pictures, got {len(made)}")
    scores: dict[str, Score] = {}
    for name, rows in made.rows.items():
        kind, noise, level = name.partition(NOISE)
        end = f"{noise}{level}" if noise and float(level) else ""
        if noise and kind == "features":
            originals = made.rows["features"]
            own: dict[str, Any] = {"noise": float(level), "model": made.models["features"]}
            own |= {"reference": "the originals", **what}
            scores[f"{prefix}/rfd_scenes{end}"] = frechet_score(rows, originals, paired=True, **own)
        elif end:
            own = {"resamples": resamples, "noise": float(level), "model": PSNR, **what}
            scores[f"{prefix}/psnr{end}"] = mean_score(rows, **own)
    return scores


class Regions(NamedTuple):
    """What is known of the regions of N pictures, of which each has up to K."""

    counts: Tensor
    """[N, K] tokens."""
    means: Tensor
    """[N, K, C] mu_k."""
    spreads: Tensor
    """[N, K] v_k, the mean squared distance to mu_k per channel."""


def regions(latents: Tensor, labels: Tensor) -> Regions:
    """Collect the regions of pictures.

    Args:
        latents: [N, C, h, w], channels divided by their standard deviation.
        labels: [N, h, w] int64, the region of each token, below 0 = none.
    """
    z = latents.flatten(2).double().transpose(1, 2)  # [N, T, C]
    flat = labels.flatten(1).clamp(min=-1).to(z.device) + 1
    number = int(flat.max()) if flat.numel() else 0
    member = F.one_hot(flat, number + 1)[:, :, 1:].double()  # [N, T, K]
    counts = member.sum(dim=1)  # [N, K]
    several = counts.clamp(min=1)
    means = torch.einsum("ntk,ntc->nkc", member, z) / several[:, :, None]
    own = torch.einsum("ntk,nkc->ntc", member, means)  # the mean of each token's own region
    squares = (z - own).square().mean(dim=2)  # [N, T]
    spreads = torch.einsum("ntk,nt->nk", member, squares) / several
    return Regions(counts, means, spreads)


def compression(found: Regions, least: int = 8) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the terms of sigma^2 and rho picture by picture, by the definition of this module.

    Pairs of regions of which neither has any spread are left out.

    Args:
        found: the regions of N pictures.
        least: fewest tokens of a region that counts.

    Returns:
        {"sigma2": ..., "rho": ...}, each the sum [N] of a picture's terms and their number [N],
        float64.
    """
    counts, means, spreads = found
    there = counts >= least  # [N, K]
    i, j = torch.triu_indices(counts.shape[1], counts.shape[1], offset=1, device=counts.device)
    gaps = (means[:, i] - means[:, j]).square().mean(dim=2)  # [N, pairs]
    within = (spreads[:, i] + spreads[:, j]) / 2
    pairs = there[:, i] & there[:, j] & (within > NO_SPREAD)
    ratios = torch.where(pairs, gaps / within.clamp(min=NO_SPREAD), 0.0)
    return {
        "sigma2": ((spreads * there).sum(dim=1), there.sum(dim=1).double()),
        "rho": (ratios.sum(dim=1), pairs.sum(dim=1).double()),
    }


def compression_rows(
    latents: Tensor,
    attributes: Sequence[Mapping[str, Any]],
    resolution: int,
    least: int | None = None,
) -> Measured:
    """Measure the perceptual compression of latents of scenes, whose masks are exact.

    Args:
        latents: [N, C, h, h], channels divided by their standard deviation over the data.
        attributes: N attributes of scenes, as samples hold them.
        resolution: width and height of the pictures in pixels.
        least: fewest tokens of a region that counts; by default 8 on a grid of 32 x 32 tokens, in
            proportion on others, at least 3 (the spread of two tokens may happen to vanish, and
            rho is a mean of ratios).

    Returns:
        Rows sigma2_object, rho_object, sigma2_part and rho_part, each [N, 2] float64: the sum of a
        picture's terms and their number.

    Raises:
        ValueError: another number of attributes than of latents.
    """
    if len(attributes) != len(latents):
        raise ValueError(f"{len(latents)} latents and {len(attributes)} scenes do not pair up")
    side = latents.shape[-1]
    least = max(3, round(8 * side * side / 1024)) if least is None else least
    masks = [scene_masks(dict(a), resolution, side) for a in attributes]
    things = torch.from_numpy(np.stack([m[0] for m in masks]))  # [N, h, h]
    # for each thing of each picture: its halves [h, h], and the number of the picture
    halves = [
        (i, torch.from_numpy(np.where(m[0] == number, m[1], 0) - 1))
        for i, m in enumerate(masks)
        for number in range(1, len(attributes[i]["things"]) + 1)
    ]
    owner = torch.tensor([i for i, _ in halves])
    parts = regions(latents[owner.to(latents.device)], torch.stack([h for _, h in halves]))
    where = f"of at least {least} of {side}x{side} tokens"
    rows, models = {}, {}
    for level, owners, found, what in (
        ("object", torch.arange(len(things)), regions(latents, things), "things and background"),
        ("part", owner, parts, "upper and lower half of a thing"),
    ):
        for name, terms in compression(found, least).items():
            total = torch.zeros(2, len(latents), dtype=torch.float64)
            total.index_add_(1, owners, torch.stack(terms).cpu())
            rows[f"{name}_{level}"] = total.T.numpy()
            models[f"{name}_{level}"] = f"own definition (eval/latents.py), {what}, {where}"
    return Measured(rows, models=models)


def score_compression(made: Measured, *, prefix: str, **what: Any) -> dict[str, Score]:
    """Score the perceptual compression of latents.

    Args:
        made: rows of `compression_rows`.
        prefix: put before the names.
        what: resamples and seed of `ratio_score`, and what is stored beside every score.

    Returns:
        `prefix`/sigma2_object, /rho_object, /sigma2_part, /rho_part; a level at which no picture
        has regions (or pairs of them) is left out.
    """
    return {
        f"{prefix}/{name}": ratio_score(*rows.T, model=made.models[name], **what)
        for name, rows in made.rows.items()
        if name.startswith(("sigma2_", "rho_")) and rows[:, 1].sum() > 0
    }


def ratio_score(
    sums: np.ndarray, numbers: np.ndarray, *, resamples: int = 1000, seed: int = 0, **what: Any
) -> Score:
    """Return the mean of terms that come in groups, with its interval over groups.

    Args:
        sums: [n] sum of the terms of each group (picture).
        numbers: [n] how many they are, 0 for groups without any, which "n" does not count.
        resamples, seed, what: as in `mean_score`.
    """
    there = numbers > 0
    sums, numbers = sums[there], numbers[there]
    n = len(sums)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, n, n) for _ in range(resamples))
    means = [sums[index].sum() / numbers[index].sum() for index in draws]
    low, high = np.quantile(means, [0.025, 0.975])
    value, terms = float(sums.sum() / numbers.sum()), int(numbers.sum())
    drawn = {"terms": terms, "resamples": resamples, "seed": seed}
    return {"value": value, "low": float(low), "high": float(high), "n": n, **drawn, **what}

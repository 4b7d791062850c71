"""Precision, recall, density and coverage; and the quality and diversity scores of GIQA.

All look for nearest neighbours, so their values depend on n and k: both sides are cut to one n,
at most 10,000, by a seeded draw.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.distances import sides, told
from eval.interval import Score, Scored, mean_score
from eval.metric import Metric
from eval.rows import Asked, Measured
from eval.spaces import SPACES

BLOCK = 1024  # rows whose distances are in memory at once
MOST, MOST_GIQA = 10_000, 5_000  # pictures of either side
BALLS, COVER = 3, 5  # k of precision and recall, and of density and coverage
WHAT = {
    "precision": "generated pictures near real ones",
    "recall": "real pictures near generated ones",
    "density": "how many real neighbourhoods hold a generated picture",
    "coverage": "real pictures that have a generated one in their neighbourhood",
}
RELATIVE = {
    "qs_relative": "quality, only to compare with others of the same n and reference",
    "ds_relative": "diversity, only to compare with others of the same n and reference",
}
SHOWN = {
    **{
        space.named(name): Metric(
            space.named(name).replace("_", " ").capitalize(),
            f"{what}, in features of {space.what}",
            better="higher",
        )
        for space in SPACES.values()
        for name, what in WHAT.items()
    },
    **{
        space.named(name): Metric(
            space.named(name).replace("_", " ").replace("s relative", "S, relative"),
            what,
            better="higher",
        )
        for space in SPACES.values()
        for name, what in RELATIVE.items()
    },
}


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return |x_i - y_j|^2 [n, m] of rows [n, d] and [m, d] float64."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return squares.clamp(min=0)


def radii(x: Tensor, ks: Sequence[int]) -> Tensor:
    """Return the squared distance of each row to its k-th nearest other row.

    Args:
        x: [n, d] float64.
        ks: one or more k, each below n.

    Returns:
        [len(ks), n] float64.
    """
    found = torch.empty(len(ks), len(x), dtype=x.dtype)
    for first in range(0, len(x), BLOCK):
        squares = squared_distances(x[first : first + BLOCK], x)
        own = torch.arange(len(squares))
        squares[own, first + own] = torch.inf
        nearest = squares.topk(max(ks), largest=False).values  # [b, max k], sorted
        found[:, first : first + BLOCK] = nearest[:, [k - 1 for k in ks]].T
    return found


def neighbourhoods(
    real: Tensor, fake: Tensor, ks: Sequence[int], strict: bool = True
) -> list[dict[str, Tensor]]:
    """Return what precision, recall, density and coverage are the means of.

    The balls of a set have its rows as centres and reach to the k-th nearest other row
    (Kynkäänniemi et al., 1904.06991, eq. 1). Precision: fake rows within a ball of real ones;
    recall: the reverse. Density: balls of real rows that hold a fake one, over k; coverage: real
    rows whose ball holds a fake one (Naeem et al., 2002.09797, eq. 5 and 6).

    Args:
        real: [n, d] float64.
        fake: [m, d] float64.
        ks: one or more k.
        strict: on its border a row is outside a ball, as in the code of 2002.09797; else inside,
            as in that of 1904.06991.

    Returns:
        Per k {precision [m], density [m], recall [n], coverage [n]} float64.

    Raises:
        ValueError: too few rows for k.
    """
    if min(len(real), len(fake)) <= max(ks):
        raise ValueError(
            f"neighbourhoods of {max(ks)} pictures need more of them on either side, got "
            f"{len(real)} real and {len(fake)} generated"
        )
    of_real, of_fake = radii(real, ks), radii(fake, ks)  # [K, n], [K, m]
    within = torch.lt if strict else torch.le
    holding = torch.zeros(len(ks), len(fake), dtype=torch.float64)
    recalled, covered = (torch.zeros(len(ks), len(real), dtype=torch.bool) for _ in range(2))
    for first in range(0, len(fake), BLOCK):
        part = slice(first, first + BLOCK)
        squares = squared_distances(fake[part], real)  # [b, n]
        for i in range(len(ks)):
            inside = within(squares, of_real[i])
            holding[i, part] = inside.sum(dim=1).double()
            covered[i] |= inside.any(dim=0)
            recalled[i] |= within(squares, of_fake[i, part, None]).any(dim=0)
    return [
        {
            "precision": (holding[i] > 0).double(),
            "recall": recalled[i].double(),
            "density": holding[i] / k,
            "coverage": covered[i].double(),
        }
        for i, k in enumerate(ks)
    ]


def nearest_l1(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the L1 distance of each row of x [n, d] to the nearest of y [m, d], and of y's to x.

    Returns:
        [n] and [m] float64.
    """
    of_x = torch.empty(len(x), dtype=torch.float64)
    of_y = torch.full((len(y),), torch.inf, dtype=torch.float64)
    for first in range(0, len(x), BLOCK):
        gaps = torch.cdist(x[first : first + BLOCK], y, p=1)
        of_x[first : first + BLOCK] = gaps.min(dim=1).values
        of_y = torch.minimum(of_y, gaps.min(dim=0).values)
    return of_x, of_y


def drawn(rows: np.ndarray, count: int, seed: int) -> Tensor:
    """Draw so many rows [n, d] without replacement, float64; all of them stay in their order."""
    if count < len(rows):
        rows = rows[np.sort(np.random.default_rng(seed).choice(len(rows), count, replace=False))]
    return torch.from_numpy(rows).to(torch.float64, copy=True)


def score_manifold(
    made: Measured, asked: Asked, reference: Measured | None, *, prefix: str, **what: Any
) -> Scored:
    """Score pictures by precision, recall (k = 3), density and coverage (k = 5).

    Args:
        made: rows "features..." of eval/spaces.py.
        asked: not looked at.
        reference: such rows of real pictures.
        prefix: put before the names.
        what: "seed" draws the pictures; see `eval.scorers.Scorer`.

    Returns:
        scores: `prefix`/precision, /recall, /density and /coverage (precision_dinov2, ...) with
            "k".
        verdicts: empty ones.

    Raises:
        ValueError: as `eval.distances.sides`, or too few pictures.
    """
    scores: dict[str, Score] = {}
    for side in sides(made, reference, "features"):
        count = min(len(side.made), len(side.rows), MOST)
        real, fake = (drawn(rows, count, what.get("seed", 0)) for rows in (side.rows, side.made))
        centre = real.mean(dim=0)  # distances lose no digits to a common offset
        real, fake = real.sub_(centre), fake.sub_(centre)
        about = {**told(side, what), "reference": f"{count} real pictures", **what}
        near, wide = neighbourhoods(real, fake, (BALLS, COVER), strict=True)
        for name in WHAT:
            k, found = (BALLS, near) if name in ("precision", "recall") else (COVER, wide)
            scores[f"{prefix}/{side.space.named(name)}"] = mean_score(
                found[name], **{"k": k, **about}
            )
    return scores, [{} for _ in range(len(made))]


def score_giqa(
    made: Measured, asked: Asked, reference: Measured | None, *, prefix: str, **what: Any
) -> Scored:
    """Score pictures by the quality and diversity scores of Improved VQ-Diffusion, relatively.

    QS is the mean over generated pictures of 1 / (L1 distance to the nearest real one), DS that
    over real pictures with the roles changed: KNN-GIQA with K = 1 (Gu et al., 2003.08932). Which
    variant, K and reference 2205.16007 took is not published, so the numbers compare only with
    one another. Arguments, results and errors as `score_manifold`; names are
    `prefix`/qs_relative and /ds_relative.
    """
    scores: dict[str, Score] = {}
    for side in sides(made, reference, "features"):
        count = min(len(side.made), len(side.rows), MOST_GIQA)
        real, fake = (drawn(rows, count, what.get("seed", 0)) for rows in (side.rows, side.made))
        of_fake, of_real = nearest_l1(fake, real)
        about = {**told(side, what), "reference": f"{count} real pictures", **what}
        for name, gaps in (("qs_relative", of_fake), ("ds_relative", of_real)):
            # an exact copy would count without bound
            scores[f"{prefix}/{side.space.named(name)}"] = mean_score(
                1 / gaps.clamp(min=1e-6), **{"k": 1, **about}
            )
    return scores, [{} for _ in range(len(made))]

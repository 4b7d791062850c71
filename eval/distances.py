"""FID, and the Frechet distance in other features, beside its floor and its limit.

All pictures are compared with the whole reference, as published numbers are. The distance falls
with n, so three numbers stand together: the distance; its floor, one half of the reference
against the other at the n that the halves allow; and FID-infinity, the limit of a line in 1/n.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from eval.frechet import FeatureStats, Moments, frechet_infinity, frechet_score
from eval.interval import Score, Scored
from eval.metric import Metric
from eval.rows import Asked, Measured
from eval.spaces import INCEPTION, SPACES, Space

ENDS: tuple[tuple[str, str, Literal["", "lower"]], ...] = (
    ("floor", "one half of the real pictures against the other", ""),
    ("infinity", "the limit of many pictures", "lower"),
)
SHOWN = {
    **{
        space.named("fid"): Metric(
            space.named("fid").upper().replace("_", " "),
            f"Frechet distance in features of {space.what}",
            better="lower",
        )
        for space in SPACES.values()
    },
    **{
        f"{space.named('fid')}_{end}": Metric(
            f"{space.named('fid').upper().replace('_', ' ')}, {end}", what, better=better
        )
        for space in SPACES.values()
        for end, what, better in ENDS
    },
    **{
        space.named("sfid"): Metric(
            space.named("sfid").upper().replace("_", " "),
            "Frechet distance in the first 7 channels of mixed_6, 17 x 17",
            better="lower",
        )
        for space in INCEPTION.values()
    },
}


class Sides(NamedTuple):
    """What is compared with what."""

    space: Space
    made: np.ndarray
    """[N, d]."""
    real: np.ndarray | Moments
    """[M, d]."""
    model: str
    """What made the features."""
    source: str
    """What made those of the reference."""

    @property
    def rows(self) -> np.ndarray:
        """Those of the reference, [M, d].

        Raises:
            ValueError: only its moments are known.
        """
        if isinstance(self.real, Moments):
            raise ValueError(
                f"{self.source} holds only mean and covariance; this score needs the pictures of "
                "the reference"
            )
        return self.real


def score_frechet(
    made: Measured, asked: Asked, reference: Measured | None, *, prefix: str, **what: Any
) -> Scored:
    """Score pictures by the rule of this module, in every space in which there are features.

    Args:
        made: rows "features..." of eval/spaces.py.
        asked: not looked at.
        reference: such rows of real pictures, or their moments: then there is no floor.
        prefix, what: see `eval.scorers.Scorer`.

    Returns:
        scores: `prefix`/fid (fid_tf, fd_dinov2, ...), its _floor and its _infinity, the limit only
            of 20 pictures or more.
        verdicts: empty ones.

    Raises:
        ValueError: no features, no reference, features of different networks, or too few pictures.
    """
    scores: dict[str, Score] = {}
    for side in sides(made, reference, "features"):
        name, about = f"{prefix}/{side.space.named('fid')}", told(side, what)
        real = side.real if isinstance(side.real, Moments) else FeatureStats.of(side.real)
        scores[name] = frechet_score(side.made, real, **about)
        if not isinstance(side.real, Moments) and len(side.real) >= 4:
            base, floor = side.real[0::2], side.real[1::2]
            floor = floor[: len(side.made)]
            halves = {**about, "reference": f"{len(base)} other real pictures of the reference"}
            scores[f"{name}_floor"] = frechet_score(floor, base, **halves)
        if len(side.made) >= 20:
            limit = frechet_infinity(side.made, real, what.get("seed", 0))
            about = {k: v for k, v in about.items() if k not in ("resamples", "seed")}
            ends = {"low": None, "high": None, "n": len(side.made)}
            scores[f"{name}_infinity"] = {"value": limit, **ends, **about}
    return scores, [{} for _ in range(len(made))]


def score_sfid(
    made: Measured, asked: Asked, reference: Measured | None, *, prefix: str, **what: Any
) -> Scored:
    """Score pictures by the Frechet distance of Inception's spatial features.

    sFID (Nash et al., 2103.03841; ADM's evaluator): the first 7 channels of mixed_6's first
    convolution, 17 x 17. Arguments, results and errors as `score_frechet`, from rows "spatial...".
    """
    scores = {
        f"{prefix}/{side.space.named('sfid')}": frechet_score(
            side.made, side.real, **told(side, what)
        )
        for side in sides(made, reference, "spatial")
    }
    return scores, [{} for _ in range(len(made))]


def sides(made: Measured, reference: Measured | None, kind: str) -> Iterator[Sides]:
    """Yield the pairs of rows that can be compared, one pair at a time in memory.

    Args:
        made: rows of what is scored.
        reference: rows or moments of real pictures.
        kind: "features" or "spatial".

    Raises:
        ValueError: there are none, or the networks of a pair differ.
    """
    if reference is None:
        raise ValueError("this score compares with real pictures; name a reference")
    found = False
    for space in SPACES.values():
        name = space.rows if kind == "features" else space.spatial
        if name not in made.rows:
            continue
        real = reference.rows.get(name, reference.moments.get(name))
        if real is None:
            continue
        model, other = made.models[name], reference.models[name]
        if name in reference.rows and other != model:
            raise ValueError(f"features of {model} and {other} do not compare")
        found = True
        yield Sides(space, made.rows[name], real, model, other)
    if not found:
        rows = ", ".join(n for n in made.rows if n != "index") or "none"
        raise ValueError(f"there are no {kind} of both pictures and reference; rows: {rows}")


def told(side: Sides, what: dict[str, Any]) -> dict[str, Any]:
    """Return what is stored beside a score: the model and the reference, unless `what` says it."""
    count = side.real.n if isinstance(side.real, Moments) else len(side.real)
    return {"model": side.model, "reference": f"{count or 'unknown number of'} pictures", **what}

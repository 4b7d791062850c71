"""Frechet distance in the features of the scenes' classifier, beside the floor of real pictures.

The reference is a set of real pictures that shares no caption with what is scored: a generator
that is asked for the very pictures of the reference comes closer to it than other real ones do,
and its distance falls below the floor. Even rows of the reference are what is compared with; odd
rows give the floor. Both sides are cut to one n, since the distance falls with n.
"""

from typing import Any

from torch import Tensor

from eval.classifier_network import Classifier
from eval.frechet import frechet_score
from eval.interval import Score, Scored
from eval.rows import Asked, Measure, Measured

OTHERS = "real pictures of other captions"  # than those of the pictures that are scored
ABOUT = (
    "features of a classifier that learnt drawn scenes only, of pictures averaged to 32 px: "
    "they compare runs on one data set, and say little of what the pictures show"
)


def feature_measure(classifier: Classifier) -> Measure:
    """Return what makes the rows of `FeatureRows`."""

    def measure(images: Tensor, asked: Asked, first: int) -> Measured:
        features = classifier.read(images)[1].numpy()
        return Measured({"features": features}, models={"features": classifier.name})

    return measure


def score_features(
    made: Measured, asked: Asked, reference: Measured | None, *, prefix: str, **what: Any
) -> Scored:
    """Score pictures of which only `FeatureRows` are known, see `eval.scorers.Scorer`.

    Without a reference there are no scores; verdicts are empty.
    """
    what = {"about": ABOUT, **what}
    scores = {} if reference is None else frechet_scores(made, reference, prefix, **what)
    return scores, [{} for _ in range(len(made))]


def frechet_scores(
    made: Measured, reference: Measured, prefix: str, **what: Any
) -> dict[str, Score]:
    """Return `prefix`/fd_scenes and its floor /fd_scenes_floor, by the rule of this module.

    Args:
        made: features [N, d] of generated pictures, N >= 2.
        reference: features [M, d] of real ones, M >= 4.
        prefix: put before the names.
        what: stored beside the scores.

    Raises:
        ValueError: too few pictures, or features of different networks.
    """
    if len(made) < 2 or len(reference) < 4:
        raise ValueError(
            "a Frechet distance needs at least 2 generated and 4 real pictures, "
            f"got {len(made)} and {len(reference)}"
        )
    model = made.models["features"]
    if reference.models["features"] != model:
        raise ValueError(f"features of {model} and {reference.models['features']} do not compare")
    real = reference.rows["features"]
    base, floor = real[0::2], real[1::2]
    n = min(len(made), len(floor))
    what = {"model": model, "reference": f"{len(base)} {OTHERS}", **what}
    return {
        f"{prefix}/fd_scenes": frechet_score(made.rows["features"][:n], base, **what),
        f"{prefix}/fd_scenes_floor": frechet_score(floor[:n], base, **what),
    }

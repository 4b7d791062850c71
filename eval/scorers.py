"""Every score by name: how it is made of rows, and how it is shown."""

from typing import Any, Protocol

from eval import (
    calls,
    clip,
    digits,
    distances,
    edits,
    features,
    inception,
    latents,
    manifold,
    mmd,
    reconstruction_scores,
    scenes,
)
from eval.interval import Scored
from eval.metric import Metric
from eval.rows import Asked, Measured


class Scorer(Protocol):
    """Rows to scores."""

    def __call__(
        self, made: Measured, asked: Asked, reference: Measured | None, *, prefix: str, **what: Any
    ) -> Scored:
        """Return the scores by name, and of every picture what is right and wrong in it.

        Args:
            made: rows of what is scored, made by the extractor of the same module.
            asked: what was asked of each picture.
            reference: rows of real pictures that share no caption with what is scored.
            prefix: put before the names.
            what: resamples and seed of the intervals' bootstrap, and what is stored beside every
                score.
        """
        ...


SCORERS: dict[str, Scorer] = {
    "scenes": scenes.score_scenes,
    "clip_scenes": scenes.score_cosine,
    "digits": digits.score_digits,
    "features": features.score_features,
    "reconstruction": reconstruction_scores.score_reconstruction,
    "edits": edits.score_edits,
    "fid": distances.score_frechet,
    "sfid": distances.score_sfid,
    "kid": mmd.score_kid,
    "cmmd": mmd.score_cmmd,
    "prdc": manifold.score_manifold,
    "giqa": manifold.score_giqa,
    "inception_score": inception.score_inception,
    "clip_score": clip.score_clip,
    "preference": clip.score_preference,
}
METRICS: dict[str, Metric] = {
    **calls.SHOWN,
    **scenes.SHOWN,
    **edits.SHOWN,
    **digits.SHOWN,
    **distances.SHOWN,
    **mmd.SHOWN,
    **manifold.SHOWN,
    **inception.SHOWN,
    **clip.SHOWN,
    **reconstruction_scores.SHOWN,
    **latents.SHOWN,
}

"""The scores that a person can ask for by name, and what each is made of; light to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from eval.extractors import FEATURES, ClipRows, InceptionRows, SceneRows
from eval.spaces import INCEPTION, SPACES

if TYPE_CHECKING:
    from eval.rows import Extractor

MODES = {
    "inception": "clean",
    "inception_tf": "legacy_tensorflow",
    "inception_pt": "legacy_pytorch",
}
CLIP = "ViT-L-14-quickgelu openai"


class Choice(NamedTuple):
    """A score by the name that a person gives it."""

    scorer: str
    """A key of eval.scorers.SCORERS."""
    features: tuple[str, ...] = ()
    """What it is made of where nobody says otherwise; nothing for scores of other rows."""
    reference: bool = True
    """Whether it compares with real pictures."""
    prompts: bool = False
    """Whether it looks at what was asked."""


CHOICES: dict[str, Choice] = {
    "fid": Choice("fid", ("inception",)),
    "kid": Choice("kid", ("inception",)),
    "prdc": Choice("prdc", ("inception",)),
    "qs_ds": Choice("giqa", ("inception",)),
    "sfid": Choice("sfid", ("inception",)),
    "inception_score": Choice("inception_score", ("inception",), reference=False),
    "cmmd": Choice("cmmd", ("clip",)),
    "clip_score": Choice("clip_score", reference=False, prompts=True),
    "hpsv2": Choice("preference", reference=False, prompts=True),
    "pickscore": Choice("preference", reference=False, prompts=True),
}
WEIGHTS = (*SPACES, "clip_score", "hpsv2", "pickscore", "lpips")
OF_MOMENTS = ("fid", "sfid")
"""Scores that ask no more of a reference than mean and covariance."""
WIDTHS = {**dict.fromkeys(INCEPTION, 2048), "dinov2": 1024, "scenes": 64}
"""Numbers per picture, by features."""
ONLY_INCEPTION = ("sfid", "inception_score")


class Wanted(NamedTuple):
    """A score, by its scorer, of the rows of one extractor."""

    score: str
    scorer: str
    space: str
    """A key of eval.spaces.SPACES; empty for scores of other rows."""
    extractor: Extractor
    reference: bool


def wanted(
    scores: Sequence[str],
    features: Sequence[str] = (),
    weights: Mapping[str, Path] | None = None,
    clip: str = CLIP,
) -> list[Wanted]:
    """Return what is measured for some scores; every file of weights is found here.

    Args:
        scores: keys of CHOICES.
        features: keys of eval.spaces.SPACES; none takes those of every score. `scenes` takes the
            embedded classifier, and the CLIP of scenes for captions.
        weights: files by the names of features and scores.
        clip: model and tag of the CLIP score.

    Raises:
        ValueError: a score that these features cannot give, or weights that are not here.
    """
    files = dict(weights or {})
    spatial, classes = "sfid" in scores, "inception_score" in scores
    found: list[Wanted] = []
    for score in scores:
        choice = CHOICES[score]
        names = [n for n in features or choice.features if choice.features]
        if score in ONLY_INCEPTION:
            names = [n for n in names if n in INCEPTION]
            if not names:
                raise ValueError(
                    f"{score} is a score of Inception-v3 alone; take features of "
                    f"{', '.join(INCEPTION)}, or leave it out"
                )
        for name in names:
            rows = FEATURES[name](files.get(name))
            if isinstance(rows, InceptionRows):
                rows = replace(rows, spatial=spatial, classes=classes)
            found.append(Wanted(score, choice.scorer, name, rows, choice.reference))
        if not choice.features:
            scorer, rows = _of_captions(score, features, files.get(score), clip)
            found.append(Wanted(score, scorer, "", rows, choice.reference))
    return found


def _of_captions(
    score: str, features: Sequence[str], weights: Path | None, clip: str
) -> tuple[str, Extractor]:
    """Scorer and extractor of a score of pictures and captions."""
    if [*features] == ["scenes"]:
        if score != "clip_score":
            raise ValueError(f"there is no embedded model of {score}; leave --features away")
        return "clip_scenes", SceneRows.of(32, 2)
    if score != "clip_score":
        return "preference", ClipRows.preference(score, weights)
    model, _, tag = clip.partition(" ")
    return "clip_score", ClipRows.of(model, tag, weights)


def weight_files(words: Sequence[str]) -> dict[str, Path]:
    """Read words NAME=FILE: files of weights by the names of features and scores.

    Raises:
        ValueError: a word of another form, or an unknown name.
    """
    files = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or name not in WEIGHTS:
            raise ValueError(f"{word!r} is no NAME=FILE of weights; names: {', '.join(WEIGHTS)}")
        files[name] = Path(path)
    return files


def described(extractor: Any) -> dict[str, Any]:
    """Return the plain settings of an extractor, files by their names."""
    return {
        "is": type(extractor).__name__,
        **{k: v.name if isinstance(v, Path) else v for k, v in vars(extractor).items()},
    }

"""Scores of generated scenes: is everything that was asked in the picture?

The rule for the things of a picture. The classifier reads things in reading order; so are the asked
ones. Asked and read things are paired by the assignment under which most colours, shapes and sizes
agree; the reading order itself wins ties. Colour, shape and size are scored under that assignment.
The relation is right where the layout is the asked one and that assignment is the reading order:
two things in swapped places have a wrong relation and right colours. A picture is right where
nothing is wrong, so the order can never be forgiven there.
"""

from collections.abc import Mapping
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.scenes import COLORS
from eval.classifier_config import ClassifierConfig
from eval.classifier_network import Classifier, decode, encode
from eval.features import OTHERS, frechet_scores
from eval.interval import Scored, mean_score
from eval.metric import Metric
from eval.rows import Asked, Measure, Measured, reduced
from eval.scene_clip import SceneClip

PARTS = ("color", "shape", "size", "relation", "background")
SHOWN = {
    "scene_accuracy": Metric(
        "Scene accuracy",
        "prompts whose every attribute, relation and background is right",
        percent=True,
        better="higher",
    ),
    "clip_scenes": Metric("CLIP scenes", "cosine of picture and prompt", better="higher"),
    "clip_scenes_real": Metric("CLIP scenes, real", "the same for real pictures"),
}


def scene_measure(classifier: Classifier, clip: SceneClip, resolution: int) -> Measure:
    """Return what makes the rows of `SceneRows`; both networks read pictures of this width."""
    models = {"labels": classifier.name, "features": classifier.name, "cosine": clip.name}

    def measure(images: Tensor, asked: Asked, first: int) -> Measured:
        images = reduced(images, resolution)
        labels, features = classifier.read(images)
        texts = [a["prompt"] if "prompt" in a else a["caption"] for a in asked]
        rows = {
            "labels": labels.to(torch.int16).numpy(),
            "features": features.numpy(),
            "cosine": clip.cosine(images, texts).numpy(),
        }
        return Measured(rows, models=models)

    return measure


def score_scenes(
    made: Measured, asked: Asked, reference: Measured | None, *, prefix: str, **what: Any
) -> Scored:
    """Score generated scenes against what was asked and real ones, see `eval.scorers.Scorer`.

    Args:
        made: rows of `SceneRows`, N pictures.
        asked: N times what was asked, with "attributes" (things in reading order, layout,
            background), as samples hold them.
        reference: rows of M >= 4 real pictures of other captions (see eval/features.py); without
            them there are no scores that need real pictures.
        prefix, what: see there.

    Returns:
        scores: `prefix`/scene_accuracy, /scene_accuracy/{color,shape,size,relation,background},
            /clip_scenes, and with a reference /fd_scenes, /fd_scenes_floor, /clip_scenes_real.
        verdicts: one {"right": bool, "wrong": names of the wrong parts, "read": attributes as the
            classifier read them, None where it recognised nothing, "text": these in words} per
            picture.

    Raises:
        ValueError: lists of different lengths, or too few pictures.
    """
    scores, verdicts = score_labels(made, asked, prefix=prefix, **what)
    clip = {"model": made.models["cosine"], "scale": "raw cosine, no prefix", **what}
    if reference is not None:
        scores |= frechet_scores(made, reference, prefix, **what)
    scores[f"{prefix}/clip_scenes"] = mean_score(made.rows["cosine"], **clip)
    if reference is not None:
        cosines = reference.rows["cosine"]
        scores[f"{prefix}/clip_scenes_real"] = mean_score(cosines, reference=OTHERS, **clip)
    return scores, verdicts


def score_cosine(
    made: Measured, asked: Asked, reference: Measured | None, *, prefix: str, **what: Any
) -> Scored:
    """Score pictures of any captions by `prefix`/clip_scenes alone, see `score_scenes`."""
    about = {"model": made.models["cosine"], "scale": "raw cosine, no prefix", **what}
    scores = {f"{prefix}/clip_scenes": mean_score(made.rows["cosine"], **about)}
    return scores, [{} for _ in range(len(made))]


def score_labels(made: Measured, asked: Asked, *, prefix: str, **what: Any) -> Scored:
    """Return the accuracies and the verdicts of `score_scenes`; `what` goes to `mean_score`."""
    if len(made) != len(asked):
        raise ValueError(
            f"{len(made)} pictures and {len(asked)} sets of attributes do not belong together"
        )
    labels = torch.from_numpy(made.rows["labels"].astype(np.int64))  # [N, 2 + 3 S]
    config = ClassifierConfig(max_objects=(labels.shape[1] - 2) // 3)
    truth = torch.tensor([encode(a["attributes"], config) for a in asked])
    parts = compare(labels, truth)
    right = torch.stack([parts[name] == 1 for name in PARTS]).all(dim=0)  # [N]
    what["model"] = made.models["labels"]
    name = f"{prefix}/scene_accuracy"
    scores = {name: mean_score(right, **what)}
    for part in PARTS:
        scores[f"{name}/{part}"] = mean_score(parts[part], **what)
    verdicts = []
    for index, row in enumerate(labels.tolist()):
        read = decode(row, config)
        wrong = [part for part in PARTS if parts[part][index] < 1]
        verdicts.append({"right": not wrong, "wrong": wrong, "read": read, "text": in_words(read)})
    return scores, verdicts


def compare(labels: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Compare what the classifier read with what was asked, by the rule of this module.

    Args:
        labels: [N, 2 + 3 S] int64 as `Classifier.read` returns them.
        truth: [N, 2 + 3 S] int64 as `encode` returns them.

    Returns:
        {part of PARTS: [N] float64 in [0, 1]}; color, shape and size are shares of the asked
        things, the others 0 or 1.
    """
    read, want = (x[:, 2:].unflatten(1, (-1, 3)) for x in (labels, truth))  # [N, S, 3]
    slots = read.shape[1]
    exists = want[:, :, 0] < len(COLORS)  # [N, S], an empty slot has the label past the last
    best = torch.full((len(read),), -1, device=read.device)
    agreed = torch.zeros(len(read), 3, dtype=torch.float64)
    in_order = torch.zeros(len(read), dtype=torch.bool)
    for order in permutations(range(slots)):  # the identity comes first and so wins ties
        same = (read[:, list(order)] == want) & exists[:, :, None]  # [N, S, 3]
        agreeing = same.sum(dim=(1, 2))
        better = agreeing > best
        best = torch.where(better, agreeing, best)
        agreed[better] = same.sum(dim=1).double()[better]
        in_order[better] = order == tuple(range(slots))
    found = agreed / exists.sum(dim=1, keepdim=True)
    relation = (labels[:, 0] == truth[:, 0]) & in_order
    background = labels[:, 1] == truth[:, 1]
    return dict(zip(PARTS, [*found.T, relation.double(), background.double()], strict=True))


def in_words(read: Mapping[str, Any]) -> str:
    """Say what the classifier read, with a question mark where it recognised nothing."""
    things = [" ".join(t[k] or "?" for k in ("size", "color", "shape")) for t in read["things"]]
    ties = {"row": " left of ", "column": " above "}
    body = ties.get(read["layout"], "; ").join(things) or "nothing"
    if read["layout"] not in ties:
        body = f"{read['layout'] or '?'}: {body}"
    return f"{body} on {read['background'] or '?'}"

"""Editing scored on scenes: half of a picture is generated anew for a caption with another thing.

A scene with two things has each of them in a half of its own. The half of one thing is masked, the
caption names another thing in its place, and the classifier says whether that thing is there now
and whether everything else is as it was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.scene_captions import caption
from data.scene_drawing import COLORS, SHAPES, SIZES, Scene, Thing
from eval.classifier_config import ClassifierConfig
from eval.classifier_network import Classifier, decode, encode
from eval.interval import Scored, mean_score
from eval.metric import Metric
from eval.rows import Asked, Measure, Measured, reduced

SHOWN = {
    "object_accuracy": Metric(
        "Asked thing", "edits in which it is there, in its place", better="higher"
    ),
    "rest_accuracy": Metric(
        "The rest", "edits after which all else is read as before", better="higher"
    ),
    "rest_l1": Metric(
        "L1 of the rest", "to the unedited picture outside the mask; 0 is the same", better="lower"
    ),
}


def edit_measure(classifier: Classifier, resolution: int) -> Measure:
    """Return what makes the rows of `EditRows` of pictures reduced to this width."""

    def measure(images: Tensor, asked: Asked, first: int) -> Measured:
        originals = torch.stack([a["original"] for a in asked])
        images, originals = (reduced(x, resolution) for x in (images, originals))
        labels = classifier.read(images)[0]
        kept = ~torch.stack([half_mask(a, *images.shape[-2:]) for a in asked])  # [B, H, W]
        apart = (images.float() - originals.float()).abs().mean(1) / 255  # [B, H, W]
        l1 = (apart * kept).sum((1, 2)) / kept.sum((1, 2))
        rows = {"labels": labels.to(torch.int16).numpy(), "l1": l1.numpy()}
        return Measured(rows, models={"labels": classifier.name})

    return measure


def edit_tasks(
    samples: Sequence[Mapping[str, Any]], count: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Choose what is changed in pictures of two things; task i depends on (seed, i) alone.

    The new thing differs from the old one in colour and shape.

    Args:
        samples: scenes with "attributes", as the data gives them.
        count: tasks to make, at most.
        seed: seed of the choices.

    Returns:
        [{"sample": index into samples, "thing": 0 or 1 (reading order), "prompt": new caption,
        "attributes": of the scene that is asked for}].
    """
    fitting = [i for i, s in enumerate(samples) if len(s["attributes"]["things"]) == 2]
    tasks = []
    for number, index in enumerate(fitting[:count]):
        rng = np.random.default_rng([seed, number])
        scene = Scene.from_attributes(samples[index]["attributes"])
        place = int(rng.integers(2))
        old = scene.things[place]
        new = Thing(
            str(rng.choice([c for c in COLORS if c != old.color])),
            str(rng.choice([s for s in SHAPES if s != old.shape])),
            str(rng.choice(list(SIZES))),
        )
        things = tuple(new if i == place else t for i, t in enumerate(scene.things))
        asked = replace(scene, things=things)
        attributes = asdict(asked) | {"things": [asdict(t) for t in things]}
        prompt = caption(asked, rng)
        tasks.append({"sample": index, "thing": place, "prompt": prompt, "attributes": attributes})
    return tasks


def half_mask(task: Mapping[str, Any], height: int, width: int) -> Tensor:
    """Mark the half of a picture in which the changed thing is: [height, width] bool."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    second = task["thing"] == 1
    if task["attributes"]["layout"] == "row":
        mask[:, width // 2 :] = second
        mask[:, : width // 2] = not second
    else:
        mask[height // 2 :] = second
        mask[: height // 2] = not second
    return mask


def score_edits(
    made: Measured, asked: Asked, reference: Measured | None, *, prefix: str, **what: Any
) -> Scored:
    """Score edited pictures against the tasks of `edit_tasks`, see `eval.scorers.Scorer`.

    Returns:
        scores: `prefix`/object_accuracy, the asked thing is read in its place; /rest_accuracy, the
            other thing, layout and background are read as they were; /rest_l1.
        verdicts: one {"right": both are right, "wrong": names, "read": attributes} per picture.
    """
    if len(made) != len(asked):
        raise ValueError(f"{len(made)} edited pictures and {len(asked)} tasks do not pair up")
    labels = made.rows["labels"]  # [N, 2 + 3 S]
    config = ClassifierConfig(max_objects=(labels.shape[1] - 2) // 3)
    same = labels == np.array([encode(a["attributes"], config) for a in asked])
    in_slot = (np.arange(labels.shape[1]) - 2) // 3  # slot of each label; below 0: the scene's
    own = in_slot == np.array([a["thing"] for a in asked])[:, None]
    thing, rest = (same | ~own).all(1), (same | own).all(1)
    model = made.models["labels"]
    scores = {
        f"{prefix}/object_accuracy": mean_score(thing, model=model, **what),
        f"{prefix}/rest_accuracy": mean_score(rest, model=model, **what),
        f"{prefix}/rest_l1": mean_score(made.rows["l1"], **what),
    }
    verdicts = []
    for row, changed, kept in zip(labels.tolist(), thing, rest, strict=True):
        wrong = [name for name, right in (("object", changed), ("rest", kept)) if not right]
        verdicts.append({"right": not wrong, "wrong": wrong, "read": decode(row, config)})
    return scores, verdicts

"""Editing scored on scenes: half of a picture is generated anew for a caption with another thing.

A scene with two things has each of them in a half of its own. The half of one thing is masked, the
caption names another thing in its place, and the judge says whether that thing is there now and
whether everything else is as it was.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.scenes import COLORS, SHAPES, SIZES, Scene, Thing, caption
from eval.interval import Score, mean_score
from eval.judge_network import Judge


def edit_tasks(
    samples: Sequence[dict[str, Any]], count: int, seed: int = 0
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
        tasks.append({
            "sample": index, "thing": place, "prompt": caption(asked, rng),
            "attributes": {
                "things": [vars(t) for t in things], "layout": asked.layout,
                "background": asked.background,
            },
        })  # fmt: skip
    return tasks


def half_mask(task: dict[str, Any], height: int, width: int) -> Tensor:
    """Mark the half of a picture in which the changed thing stands: [height, width] bool."""
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
    images: Tensor,
    originals: Tensor,
    tasks: Sequence[dict[str, Any]],
    *,
    judge: Judge,
    prefix: str = "edit",
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, Score], list[dict[str, Any]]]:
    """Score edited pictures.

    Args:
        images: [N, 3, H, W] uint8 edited pictures.
        originals: [N, 3, H, W] uint8: what an edit that changes nothing would give, that is, the
            reconstructions of the pictures.
        tasks: N tasks of `edit_tasks`.
        judge: reads the pictures.
        prefix: put before the names.
        resamples: bootstrap draws of the means.
        seed: seed of the bootstrap.

    Returns:
        scores: `prefix`/object_accuracy, the asked thing is read in its place; /rest_accuracy, the
            other thing, layout and background are read as they were; /rest_l1, mean absolute
            difference to `originals` outside the mask, in [0, 1].
        verdicts: one {"right": both are right, "wrong": names, "text": what was read} per picture.

    Raises:
        ValueError: lists of different lengths.
    """
    if not len(images) == len(originals) == len(tasks):
        raise ValueError(
            f"{len(images)} edited pictures, {len(originals)} originals and {len(tasks)} tasks do "
            "not belong together"
        )
    labels = judge.read(images)[0]
    truth = torch.tensor([judge.encode(t["attributes"]) for t in tasks])
    same = labels == truth  # [N, 2 + 3 S]
    places = torch.tensor([t["thing"] for t in tasks])
    in_slot = (torch.arange(labels.shape[1]) - 2) // 3  # slot of each label; below 0: the scene's
    own = in_slot == places[:, None]
    thing = (same | ~own).all(1)
    rest = (same | own).all(1)
    height, width = images.shape[-2:]
    kept = ~torch.stack([half_mask(t, height, width) for t in tasks])  # [N, H, W]
    apart = (images.float() - originals.float()).abs().mean(1) / 255  # [N, H, W]
    l1 = (apart * kept).sum((1, 2)) / kept.sum((1, 2))
    what: dict[str, Any] = {"resamples": resamples, "seed": seed, "model": judge.name}
    scores = {
        f"{prefix}/object_accuracy": mean_score(thing, **what),
        f"{prefix}/rest_accuracy": mean_score(rest, **what),
        f"{prefix}/rest_l1": mean_score(l1, resamples=resamples, seed=seed),
    }
    verdicts = []
    for row, asked, others in zip(labels.tolist(), thing.tolist(), rest.tolist(), strict=True):
        wrong = [name for name, right in (("object", asked), ("rest", others)) if not right]
        verdicts.append({"right": not wrong, "wrong": wrong, "read": judge.decode(row)})
    return scores, verdicts

"""Scores of generated scenes: is everything that was asked in the picture?

The rule for the things of a picture. The judge reads things in reading order; so are the asked
ones. Asked and read things are paired by the assignment under which most colours, shapes and sizes
agree; the reading order itself wins ties. Colour, shape and size are scored under that assignment.
The relation is right where the layout is the asked one and that assignment is the reading order:
two things that stand in swapped places have a wrong relation and right colours. A picture is right
where nothing is wrong, so the order can never be forgiven there.
"""

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.scenes import COLORS
from eval.frechet import FeatureStats, frechet_distance
from eval.interval import Score, mean_score, normal_score
from eval.judge_network import Judge
from eval.scene_clip import SceneClip

PARTS = ("color", "shape", "size", "relation", "background")


def score_scenes(
    images: Tensor,
    asked: Sequence[Mapping[str, Any]],
    captions: Sequence[str],
    *,
    judge: Judge,
    clip: SceneClip,
    real_images: Tensor,
    real_captions: Sequence[str],
    prefix: str = "eval",
    reference: str = "scenes val",
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, Score], list[dict[str, Any]]]:
    """Score generated scenes against what was asked and against real ones.

    Every second real picture belongs to the reference of the Frechet distance; the others give its
    floor. Both sides are cut to the same n, the smaller of the generated pictures and
    half of the real ones, since the distance falls with n.

    Args:
        images: [N, 3, H, W] uint8 generated pictures, N >= 2.
        asked: N attributes (things in reading order, layout, background), as samples hold them.
        captions: N prompts.
        judge: reads the pictures; its features are the space of the Frechet distance.
        clip: scores picture against prompt by the raw cosine.
        real_images: [M, 3, H, W] uint8 pictures of the split that was asked, M >= 4.
        real_captions: M captions.
        prefix: put before the names, eval or eval/heldout.
        reference: what the real pictures are, stored beside the scores.
        resamples: bootstrap draws of the means; a fifth of it for the Frechet distance.
        seed: seed of the bootstrap.

    Returns:
        scores: `prefix`/scene_accuracy, /scene_accuracy/{color,shape,size,relation,background},
            /fd_scenes, /fd_scenes_floor, /clip_scenes, /clip_scenes_real; each {"value", "low",
            "high", "n", "model", ...}. The intervals are over pictures.
        verdicts: one {"right": bool, "wrong": names of the wrong parts, "read": attributes as the
            judge read them, None where it recognised nothing, "text": these in words} per picture.

    Raises:
        ValueError: lists of different lengths, or too few pictures.
    """
    if not len(images) == len(asked) == len(captions):
        raise ValueError(
            f"{len(images)} pictures, {len(asked)} sets of attributes and {len(captions)} "
            "captions do not belong together"
        )
    if len(images) < 2 or len(real_images) < 4:
        raise ValueError(
            f"scoring scenes needs at least 2 generated and 4 real pictures, "
            f"got {len(images)} and {len(real_images)}"
        )
    labels, features = judge.read(images)
    truth = torch.tensor([judge.encode(dict(a)) for a in asked])
    parts = compare(labels, truth)
    chance = {"resamples": resamples, "seed": seed}
    right = torch.stack([parts[name] == 1 for name in PARTS]).all(dim=0)  # [N]
    name = f"{prefix}/scene_accuracy"
    scores = {name: mean_score(right, **chance, model=judge.name)}
    for part in PARTS:
        scores[f"{name}/{part}"] = mean_score(parts[part], **chance, model=judge.name)

    real_features = judge.read(real_images)[1]
    base_features, floor_features = real_features[0::2], real_features[1::2]
    n = min(len(images), len(floor_features))
    base = FeatureStats.of(base_features)
    space = {"model": judge.name, "resamples": max(2, resamples // 5), "seed": seed,
             "reference": f"{len(base_features)} pictures of {reference}"}  # fmt: skip
    scores[f"{prefix}/fd_scenes"] = frechet_score(features[:n], base, **space)
    scores[f"{prefix}/fd_scenes_floor"] = frechet_score(floor_features[:n], base, **space)

    cosines = clip.cosine(images, list(captions))
    real_cosines = clip.cosine(real_images, list(real_captions))
    means: dict[str, Any] = {**chance, "model": clip.name, "scale": "raw cosine, no prefix"}
    scores[f"{prefix}/clip_scenes"] = mean_score(cosines, **means)
    scores[f"{prefix}/clip_scenes_real"] = mean_score(real_cosines, **means, reference=reference)

    verdicts = []
    for index, row in enumerate(labels.tolist()):
        read = judge.decode(row)
        wrong = [part for part in PARTS if parts[part][index] < 1]
        verdicts.append({"right": not wrong, "wrong": wrong, "read": read, "text": in_words(read)})
    return scores, verdicts


def compare(labels: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Compare what the judge read with what was asked, by the rule of this module.

    Args:
        labels: [N, 2 + 3 S] int64 as `Judge.read` returns them.
        truth: [N, 2 + 3 S] int64 as `Judge.encode` returns them.

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
        points = same.sum(dim=(1, 2))
        better = points > best
        best = torch.where(better, points, best)
        agreed[better] = same.sum(dim=1).double()[better]
        in_order[better] = order == tuple(range(slots))
    share = agreed / exists.sum(dim=1, keepdim=True)
    relation = (labels[:, 0] == truth[:, 0]) & in_order
    background = labels[:, 1] == truth[:, 1]
    return dict(zip(PARTS, [*share.T, relation.double(), background.double()], strict=True))


def frechet_score(features: Tensor, base: FeatureStats, **what: Any) -> Score:
    """Return the Frechet distance of features [n, d] to fixed statistics, with its interval."""
    rows = features.double()

    def distance(index: np.ndarray) -> float:
        return frechet_distance(FeatureStats.of(rows[torch.from_numpy(index)]), base)

    value = frechet_distance(FeatureStats.of(rows), base)
    return normal_score(value, len(rows), distance, **what)


def in_words(read: Mapping[str, Any]) -> str:
    """Say what the judge read, with a question mark where it recognised nothing."""
    things = [" ".join(t[k] or "?" for k in ("size", "color", "shape")) for t in read["things"]]
    ties = {"row": " left of ", "column": " above "}
    body = ties.get(read["layout"], "; ").join(things) or "nothing"
    if read["layout"] not in ties:
        body = f"{read['layout'] or '?'}: {body}"
    return f"{body} on {read['background'] or '?'}"

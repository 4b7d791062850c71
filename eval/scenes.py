"""Scores of generated scenes: is everything that was asked in the picture, and does the rest vary?

The rule for the things of a picture. The classifier reads things in reading order; so are the asked
ones. Asked and read things are paired by the assignment under which most colours, shapes and sizes
agree; the reading order itself wins ties. Colour, shape and size are scored under that assignment.
The relation is right where the layout is the asked one and that assignment is the reading order:
two things in swapped places have a wrong relation and right colours. A picture is right where
nothing is wrong, so the order can never be forgiven there.

The rule for a caption in part. What it leaves out is right where the classifier reads any value
that scenes have, and is no atom: atoms are what the caption says, a colour, shape or size of a
thing, the relation and the background each one. Where it says no relation the asked things may
stand anywhere, and there may be others.

Coverage is of scenes as read, the same scene being the same attributes, relation and background.
Let m pictures be made for one and the same asked scene, which K scenes show. They cover it by

    (distinct scenes among those of them that are right) / min(m, K),

and the coverage of a set is the mean over its asked scenes. A generator that draws the same scene
at every asking has 1 / min(m, K) however right it is, one that is wrong has 0. The same of real
pictures of the same prompts stands beside it: they fall below 1, since a draw repeats itself too.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.scene_captions import AskedScene, completions, parse
from data.scene_drawing import LAYOUTS, Scene
from eval.classifier_config import ClassifierConfig
from eval.classifier_network import FREE, Classifier, decode, encode_asked
from eval.features import OTHERS, frechet_scores
from eval.interval import Score, Scored, mean_score
from eval.metric import Metric
from eval.rows import Asked, Measure, Measured, reduced
from eval.scene_clip import SceneClip

PARTS = ("color", "shape", "size", "relation", "background")
SHOWN = {
    "scene_accuracy": Metric(
        "Scene accuracy",
        "prompts whose every attribute, relation and background is right",
        better="higher",
    ),
    "scene_atoms": Metric(
        "Scene atoms",
        "share of what a prompt says that is right: attributes, relation, background",
        better="higher",
    ),
    "scene_coverage": Metric(
        "Scene coverage",
        "share of the scenes that an asking can give which appear, of as many as it is asked for",
        better="higher",
    ),
    "scene_coverage_real": Metric("Scene coverage, real", "the same of real pictures"),
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
        asked: N times what was asked, the "prompt" or "caption", and with "attributes" (things in
            reading order, layout, background) what a real picture of it shows.
        reference: rows of M >= 4 real pictures of other captions (see eval/features.py); without
            them there are no scores that need real pictures.
        prefix, what: see there.

    Returns:
        scores: those of `score_labels`; `prefix`/scene_coverage, and where attributes are known
            /scene_coverage_real; /clip_scenes, and with a reference /fd_scenes, /fd_scenes_floor,
            /clip_scenes_real.
        verdicts: those of `score_labels`.

    Raises:
        ValueError: lists of different lengths, too few pictures, or a prompt that is not a caption
            of scenes.
    """
    prompts = [a["prompt"] if "prompt" in a else a["caption"] for a in asked]
    wanted = [parse(prompt) for prompt in prompts]
    scores, verdicts = score_labels(made, wanted, prefix=prefix, **what)
    scores |= _coverage_scores(made, wanted, asked, verdicts, prefix=prefix, **what)
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


def score_labels(
    made: Measured, wanted: Sequence[AskedScene], *, prefix: str, **what: Any
) -> Scored:
    """Score what was read in pictures against what was wanted of them.

    Args:
        made: with the rows "labels" of `Classifier.read`, N pictures.
        wanted: N times what was wanted.
        prefix, what: see `eval.scorers.Scorer`.

    Returns:
        scores: `prefix`/scene_accuracy and /scene_accuracy/{color,shape,size,relation,background};
            /scene_atoms; and of both /{k}_things, where prompts name different numbers of things.
        verdicts: one {"right": bool, "wrong": names of the wrong parts, "read": attributes as the
            classifier read them, None where it recognised nothing, "text": these in words} per
            picture.

    Raises:
        ValueError: lists of different lengths.
    """
    if len(made) != len(wanted):
        raise ValueError(f"{len(made)} pictures and {len(wanted)} prompts do not belong together")
    labels, config = _labels(made)
    truth = torch.tensor([encode_asked(scene, config) for scene in wanted])
    pairing = pair(labels, truth)
    parts = compare(labels, truth, pairing)
    right = torch.stack([parts[name] == 1 for name in PARTS]).all(dim=0)  # [N]
    atoms = atoms_right(labels, truth, pairing)  # [N]
    what["model"] = made.models["labels"]
    accuracy, share = f"{prefix}/scene_accuracy", f"{prefix}/scene_atoms"
    scores = {accuracy: mean_score(right, **what)}
    scores |= {f"{accuracy}/{part}": mean_score(parts[part], **what) for part in PARTS}
    scores[share] = mean_score(atoms, **what)
    counts = np.array([len(scene.things) for scene in wanted])
    for count in np.unique(counts) if np.ptp(counts) else ():
        chosen = torch.from_numpy(counts == count)
        end = f"{count}_things" if count > 1 else "1_thing"
        scores[f"{accuracy}/{end}"] = mean_score(right[chosen], **what)
        scores[f"{share}/{end}"] = mean_score(atoms[chosen], **what)
    verdicts = []
    for index, row in enumerate(labels.tolist()):
        read = decode(row, config)
        wrong = [part for part in PARTS if parts[part][index] < 1]
        verdicts.append({"right": not wrong, "wrong": wrong, "read": read, "text": in_words(read)})
    return scores, verdicts


def _coverage_scores(
    made: Measured,
    wanted: Sequence[AskedScene],
    asked: Asked,
    verdicts: Sequence[Mapping[str, Any]],
    *,
    prefix: str,
    **what: Any,
) -> dict[str, Score]:
    """Return `prefix`/scene_coverage and /scene_coverage_real, intervals over asked scenes."""
    most = _labels(made)[1].max_objects
    shown = [scene_of(v["read"]) if v["right"] else None for v in verdicts]
    sets = {"scene_coverage": shown}
    if all("attributes" in a for a in asked):
        sets["scene_coverage_real"] = [Scene.from_attributes(a["attributes"]) for a in asked]
    what["model"] = made.models["labels"]
    scores = {}
    for name, scenes in sets.items():
        values = coverage(scenes, wanted, most)
        own = {**what, "n": len(made), "asked_scenes": len(values)}
        scores[f"{prefix}/{name}"] = mean_score(values, **own)
    return scores


def coverage(
    shown: Sequence[Scene | None], wanted: Sequence[AskedScene], max_objects: int
) -> list[float]:
    """Return by how much pictures cover each of the distinct asked scenes, see the module.

    Args:
        shown: what N pictures show, None where that is not what was wanted.
        wanted: what was asked of each.
        max_objects: most things in a scene.

    Returns:
        One value in [0, 1] per distinct asked scene, in the order of their first asking.
    """
    groups: defaultdict[AskedScene, list[Scene | None]] = defaultdict(list)
    for scene, ask in zip(shown, wanted, strict=True):
        groups[ask].append(scene)
    return [
        len(set(found) - {None}) / _possible(ask, len(found), max_objects)
        for ask, found in groups.items()
    ]


def _possible(asked: AskedScene, most: int, max_objects: int) -> int:
    """Count the scenes that show what is asked, up to `most`."""
    found: set[Scene] = set()
    for scene in completions(asked, max_objects):
        found.add(scene)
        if len(found) == most:
            break
    return len(found)


def scene_of(read: Mapping[str, Any]) -> Scene:
    """Return the scene that a right reading is of; slots past its layout's things do not count."""
    count = len(LAYOUTS[read["layout"]])
    return Scene.from_attributes({**read, "things": read["things"][:count]})


class Pairing(NamedTuple):
    """Asked things and the read ones that they are compared with."""

    read: Tensor
    """[N, S, 3] labels of color, shape and size as read, in the order of the asked things."""
    exists: Tensor
    """[N, S] bool, the things that count: the asked ones, and unasked ones that may be there."""
    in_order: Tensor
    """[N] bool, the assignment is the reading order."""


def _labels(made: Measured) -> tuple[Tensor, ClassifierConfig]:
    """Return the labels [N, 2 + 3 S] and the settings that say what they mean."""
    labels = torch.from_numpy(made.rows["labels"].astype(np.int64))
    return labels, ClassifierConfig(max_objects=(labels.shape[1] - 2) // 3)


def _none(slots: int) -> tuple[Tensor, Tensor]:
    """Return the labels that say none of these: [2] of layout and background, [3] of a thing."""
    sizes = torch.tensor([len(o) for o in ClassifierConfig(max_objects=slots).heads])
    return sizes[:2], sizes[2:5]


def pair(labels: Tensor, truth: Tensor) -> Pairing:
    """Pair read and asked things by the rule of this module.

    Args:
        labels: [N, 2 + 3 S] int64 as `Classifier.read` returns them.
        truth: [N, 2 + 3 S] int64 as `encode_asked` returns them.
    """
    read, want = (x[:, 2:].unflatten(1, (-1, 3)) for x in (labels, truth))  # [N, S, 3]
    slots = read.shape[1]
    none = _none(slots)[1]
    named = ((want != FREE) & (want < none)).any(dim=2).sum(dim=1)  # [N]
    there = torch.maximum(named, _things_of(labels[:, 0], slots))
    total = torch.where(truth[:, 0] == FREE, there, named)
    exists = torch.arange(slots) < total[:, None]  # [N, S], named things come first
    best = torch.full((len(read),), -1)
    paired, in_order = read.clone(), torch.zeros(len(read), dtype=torch.bool)
    for order in permutations(range(slots)):  # the identity comes first and so wins ties
        turned = read[:, list(order)]
        agreeing = (_agree(turned, want, none) & exists[:, :, None]).sum(dim=(1, 2))
        better = agreeing > best
        best = torch.where(better, agreeing, best)
        paired[better] = turned[better]
        in_order[better] = order == tuple(range(slots))
    return Pairing(paired, exists, in_order)


def _things_of(layout: Tensor, slots: int) -> Tensor:
    """Return the number of things of each layout label [N], 0 where it is none."""
    names = ClassifierConfig(max_objects=slots).heads[0]
    return torch.tensor([*(len(LAYOUTS[name]) for name in names), 0])[layout]


def _agree(read: Tensor, want: Tensor, none: Tensor) -> Tensor:
    """Say which labels are as asked, or any that scenes have where nothing is."""
    return torch.where(want == FREE, read < none, read == want)


def compare(labels: Tensor, truth: Tensor, pairing: Pairing | None = None) -> dict[str, Tensor]:
    """Compare what the classifier read with what was asked, by the rule of this module.

    Args:
        labels, truth: as in `pair`.
        pairing: what that returned for them.

    Returns:
        {part of PARTS: [N] float64 in [0, 1]}; color, shape and size are shares of the things that
        count, the others 0 or 1.
    """
    read, exists, in_order = pairing or pair(labels, truth)
    slots = exists.shape[1]
    ends, none = _none(slots)
    same = _agree(read, truth[:, 2:].unflatten(1, (-1, 3)), none) & exists[:, :, None]
    found = same.double().sum(dim=1) / exists.sum(dim=1, keepdim=True)  # [N, 3]
    layout, background = _agree(labels[:, :2], truth[:, :2], ends).T
    free = truth[:, 0] == FREE
    enough = _things_of(labels[:, 0], slots) >= exists.sum(dim=1)
    relation = layout & torch.where(free, enough, in_order)
    return dict(zip(PARTS, [*found.T, relation.double(), background.double()], strict=True))


def atoms_right(labels: Tensor, truth: Tensor, pairing: Pairing) -> Tensor:
    """Return which share of what each prompt says is right, [N] float64.

    Args:
        labels, truth, pairing: as in `compare`.
    """
    read, exists, in_order = pairing
    want = truth[:, 2:].unflatten(1, (-1, 3))  # [N, S, 3]
    said = (want != FREE) & exists[:, :, None]
    right = (said & (read == want)).sum(dim=(1, 2)) + (labels[:, 0] == truth[:, 0]) * in_order
    right = right + (labels[:, 1] == truth[:, 1])  # FREE is no label, so it agrees with none
    atoms = said.sum(dim=(1, 2)) + (truth[:, :2] != FREE).sum(dim=1)
    return right.double() / atoms


def in_words(read: Mapping[str, Any]) -> str:
    """Say what the classifier read, with a question mark where it recognised nothing."""
    things = [" ".join(t[k] or "?" for k in ("size", "color", "shape")) for t in read["things"]]
    ties = {"row": " left of ", "column": " above "}
    body = ties.get(read["layout"], "; ").join(things) or "nothing"
    if read["layout"] not in ties:
        body = f"{read['layout'] or '?'}: {body}"
    return f"{body} on {read['background'] or '?'}"

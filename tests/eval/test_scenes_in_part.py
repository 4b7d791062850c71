"""What is read in a picture for a caption in part counts as asked, and a collapse is seen."""

from dataclasses import asdict, replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.scene_captions import AskedScene, ask_in_part, complete, completions, parse
from data.scene_drawing import Scene, Thing, sample_scene
from data.scenes import REPEATS, scenes
from eval.classifier_config import ClassifierConfig
from eval.classifier_network import FREE, encode, encode_asked
from eval.rows import Measured
from eval.scenes import PARTS, atoms_right, compare, coverage, pair, score_scenes

RED, BLUE = Thing("red", "circle", "small"), Thing("blue", "square", "large")
ASKED = Scene((RED, BLUE), "row", "grey")
WHITE = replace(ASKED, background="white")
OPTIONS: dict[str, Any] = {"prefix": "eval", "resamples": 200, "seed": 0}


def read_as(shown: list[Scene], most: int = 2) -> Measured:
    """Rows of pictures that the classifier reads without a fault."""
    config = ClassifierConfig(max_objects=most)
    labels = np.array([encode(asdict(scene), config) for scene in shown], np.int16)
    rows = {"labels": labels, "cosine": np.full(len(shown), 0.5, np.float32)}
    return Measured(rows, models=dict.fromkeys(rows, "planted"))


def score(
    shown: list[Scene], prompts: list[str], real: list[Scene] | None = None, most: int = 2
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    asked: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    for row, scene in zip(asked, real or [], strict=bool(real)):
        row["attributes"] = asdict(scene)
    return score_scenes(read_as(shown, most), asked, None, **OPTIONS)


def swapped(scene: Scene) -> Scene:
    return replace(scene, things=scene.things[::-1])


@pytest.mark.parametrize(
    ("prompt", "shown", "wrong", "atoms"),
    [
        ("a small red circle left of a large blue square", ASKED, [], 1),
        (
            "A SMALL RED CIRCLE left of a large blue square.",
            replace(ASKED, background="white"),
            [],
            1,
        ),
        ("a red circle left of a blue square on grey", ASKED, [], 1),
        ("a large red circle left of a blue square on grey", ASKED, ["size"], 6 / 7),
        ("a circle left of a square on grey", ASKED, [], 1),
        ("a green circle left of a square on white", ASKED, ["color", "background"], 3 / 5),
        ("a red circle and a blue square", ASKED, [], 1),
        ("a blue square and a red circle", ASKED, [], 1),
        ("a red circle and a blue square", replace(swapped(ASKED), layout="column"), [], 1),
        ("a red circle left of a blue square", swapped(ASKED), ["relation"], 4 / 5),
        ("a small red circle", ASKED, [], 1),
        ("a large blue square, grey background", ASKED, [], 1),
        ("a small blue square, grey background", ASKED, ["size"], 3 / 4),
        ("a purple triangle", ASKED, ["color", "shape"], 0),
    ],
)
def test_only_what_was_asked_counts(
    prompt: str, shown: Scene, wrong: list[str], atoms: float
) -> None:
    scores, verdicts = score([shown], [prompt])
    assert verdicts[0]["wrong"] == wrong and verdicts[0]["right"] == (not wrong)
    assert scores["eval/scene_accuracy"]["value"] == (not wrong)
    assert scores["eval/scene_atoms"]["value"] == pytest.approx(atoms)


@pytest.mark.parametrize(
    ("prompt", "label", "wrong"),
    [
        ("a small red circle left of a large blue square", 1, ["background"]),
        ("a red circle left of a large blue square on grey", 4, ["size"]),
        ("a small circle left of a large blue square on grey", 2, ["color"]),
        ("a small red circle and a large blue square on grey", 0, ["relation"]),
        ("a small red circle on grey", 5, ["color"]),
        ("a small red circle on grey", 6, ["shape"]),
    ],
)
def test_what_was_not_asked_must_be_something_that_scenes_have(
    prompt: str, label: int, wrong: list[str]
) -> None:
    made = read_as([ASKED])
    made.rows["labels"][0, label] = len(ClassifierConfig().heads[label])  # none of these
    scores, verdicts = score_scenes(made, [{"prompt": prompt}], None, **OPTIONS)
    assert verdicts[0]["wrong"] == wrong
    assert scores["eval/scene_atoms"]["value"] == 1  # it is no atom


def test_unasked_things_may_be_there_and_must_be_things() -> None:
    three = Scene((BLUE, RED, BLUE), "two above one", "grey")
    prompt = "a small red circle and a large blue square"
    _, verdicts = score([three, ASKED], [prompt] * 2, most=4)
    assert all(verdict["right"] for verdict in verdicts)
    made = read_as([three], 4)
    made.rows["labels"][0, 8] = 6  # the colour of the third thing is none
    _, verdicts = score_scenes(made, [{"prompt": prompt}], None, **OPTIONS)
    assert verdicts[0]["wrong"] == ["color"]


@given(st.integers(0, 2**32), st.integers(2, 4), st.booleans())
@settings(max_examples=150)
def test_right_is_what_the_completions_say(seed: int, most: int, related: bool) -> None:
    """A picture is right exactly where its scene is one of those that show what is asked."""
    rng = np.random.default_rng(seed)
    asked = ask_in_part(sample_scene(rng, most), rng)
    scene = complete(asked, rng, most) if related else sample_scene(rng, most)
    if related and rng.random() < 0.5:  # one thing is another, so that it is wrong now and then
        things = list(scene.things)
        things[rng.integers(len(things))] = sample_scene(rng).things[0]
        scene = replace(scene, things=tuple(things))
    config = ClassifierConfig(max_objects=most)
    labels = torch.tensor([encode(asdict(scene), config)])
    truth = torch.tensor([encode_asked(asked, config)])
    parts = compare(labels, truth)
    right = all(float(parts[part]) == 1 for part in PARTS)
    assert right == shows(scene, asked)
    assert not right or float(atoms_right(labels, truth, pair(labels, truth))) == 1


def shows(scene: Scene, asked: AskedScene) -> bool:
    orders = [scene.things] if asked.layout else permutations(scene.things, len(asked.things))
    options = [set(thing.options()) for thing in asked.things]
    return (
        asked.background in (None, scene.background)
        and asked.layout in (None, scene.layout)
        and any(all(map(set.__contains__, options, order)) for order in orders)
    )


def test_labels_of_what_is_asked() -> None:
    config = ClassifierConfig(max_objects=3)
    whole = AskedScene.of(ASKED)
    assert encode_asked(whole, config) == encode(asdict(ASKED), config)
    none = encode_asked(parse("a red circle"), config)
    assert none == [FREE, FREE, 0, 0, *[FREE] * 7]
    ordered = encode_asked(parse("a red circle above a square on black"), config)
    assert ordered == [1, 0, 0, 0, FREE, FREE, 1, FREE, 6, 3, 2]
    with pytest.raises(ValueError, match="at most 2 things"):
        encode_asked(parse("a circle, a circle and a circle"), ClassifierConfig())


def test_scores_are_told_apart_by_the_number_of_things() -> None:
    rng = np.random.default_rng(0)
    asked = [sample_scene(rng, 4) for _ in range(60)]
    prompts = [s["caption"] for s in scenes("val", 60, max_objects=4)]
    real = [Scene.from_attributes(s["attributes"]) for s in scenes("val", 60, max_objects=4)]
    scores, verdicts = score(real, prompts, most=4)
    assert all(verdict["right"] for verdict in verdicts)
    for name in ("scene_accuracy", "scene_atoms"):
        parts = [scores[f"eval/{name}/{k}_things"] for k in (2, 3, 4)]
        assert all(part["value"] == 1 for part in parts)
        assert [part["n"] for part in parts] == [
            sum(len(s.things) == k for s in real) for k in (2, 3, 4)
        ]
    scores, _ = score(asked, prompts, most=4)
    atoms = {k: scores[f"eval/scene_atoms/{k}_things"]["value"] for k in (2, 3, 4)}
    counts = {k: sum(len(s.things) == k for s in real) for k in (2, 3, 4)}
    whole = scores["eval/scene_atoms"]
    mean = sum(atoms[k] * counts[k] for k in atoms) / 60
    assert whole["value"] == pytest.approx(mean) and whole["low"] < whole["value"] < whole["high"]
    assert scores["eval/scene_accuracy"]["value"] < whole["value"]  # an atom right by chance
    assert "eval/scene_accuracy/2_things" not in score([ASKED], ["a circle and a square"])[0]


def partial(count: int) -> tuple[list[str], list[Scene]]:
    """The captions in part, and the scenes of the real pictures of them."""
    samples = list(scenes("partial", count))
    return [s["caption"] for s in samples], [
        Scene.from_attributes(s["attributes"]) for s in samples
    ]


def test_a_perfect_sampler_covers_as_real_pictures_do() -> None:
    prompts, real = partial(64 * REPEATS)
    rng = np.random.default_rng(1)
    scores, _ = score([complete(parse(p), rng) for p in prompts], prompts, real)
    own, floor = scores["eval/scene_coverage"], scores["eval/scene_coverage_real"]
    assert scores["eval/scene_accuracy"]["value"] == 1
    assert own["low"] <= floor["value"] <= own["high"]
    assert floor["low"] <= own["value"] <= floor["high"]
    assert own["n"] == 64 * REPEATS and own["asked_scenes"] == len(set(map(parse, prompts)))


def test_a_collapsed_sampler_is_seen() -> None:
    """It draws one picture per prompt, and that is always right."""
    prompts, real = partial(64 * REPEATS)
    once = {prompt: scene for prompt, scene in zip(prompts, real, strict=True)}
    scores, _ = score([once[prompt] for prompt in prompts], prompts, real)
    assert scores["eval/scene_accuracy"]["value"] == scores["eval/scene_atoms"]["value"] == 1
    assert scores["eval/scene_coverage"]["high"] < scores["eval/scene_coverage_real"]["low"] - 0.3


def test_a_sampler_of_one_picture_per_family_is_seen_in_whole_captions() -> None:
    """A family: the same shapes in the same relation."""
    samples = list(scenes("val", 200))
    real = [Scene.from_attributes(s["attributes"]) for s in samples]
    family = [(scene.layout, *(thing.shape for thing in scene.things)) for scene in real]
    one = dict(zip(family, real, strict=True))
    prompts = [s["caption"] for s in samples]
    scores, _ = score([one[kind] for kind in family], prompts, real)
    assert scores["eval/scene_coverage_real"]["value"] == 1
    assert scores["eval/scene_coverage"]["high"] < 0.2
    perfect, _ = score(real, prompts, real)
    assert perfect["eval/scene_coverage"]["value"] == 1


def test_coverage_by_hand() -> None:
    grounds = [replace(ASKED, background=b) for b in ("grey", "white", "black")]
    free = parse("a small red circle left of a large blue square")
    assert len(set(completions(free))) == 3
    assert coverage([grounds[0]] * 6, [free] * 6, 2) == [pytest.approx(1 / 3)]
    assert coverage([*grounds, None], [free] * 4, 2) == [1]
    assert coverage([grounds[0], grounds[1]], [free] * 2, 2) == [1]
    assert coverage([None, grounds[1]], [free] * 2, 2) == [0.5]
    whole = AskedScene.of(ASKED)
    assert coverage([ASKED, None, ASKED], [whole, free, whole], 2) == [1, 0]


def test_a_prompt_that_is_no_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="'a zebra' is none of scenes"):
        score([ASKED], ["a zebra"])

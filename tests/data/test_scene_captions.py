"""Captions of scenes say what they should, whole or in part, and are read back."""

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.scene_captions import (
    OMITTED,
    AskedScene,
    AskedThing,
    ask_in_part,
    caption,
    caption_in_part,
    complete,
    completions,
    parse,
    say,
)
from data.scene_drawing import (
    BACKGROUNDS,
    COLORS,
    LAYOUTS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    sample_scene,
)

SEEDS, MOST = st.integers(0, 2**32), st.integers(2, 4)
RED, BLUE = AskedThing("circle", "red", "small"), AskedThing("square", "blue", "large")
CIRCLE = AskedThing("circle", None, None)
WHOLE = Scene((Thing("red", "circle", "small"), Thing("blue", "square", "large")), "row", "grey")


def test_captions_name_everything_in_either_order() -> None:
    rng = np.random.default_rng(0)
    row = {caption(WHOLE, rng) for _ in range(200)}
    assert len(row) == 16  # two orders, two relations each, four phrasings
    for text in row:
        assert "small red circle" in text and "large blue square" in text and "grey" in text
        first = text.index("small red circle") < text.index("large blue square")
        assert ("left of" in text) == first and ("right of" in text) != first


@given(SEEDS, MOST)
def test_a_whole_caption_is_read_back(seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, most)
    assert parse(caption(scene, rng)) == AskedScene.of(scene)


@given(SEEDS, MOST)
def test_a_caption_in_part_is_read_back_and_true(seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, most)
    asked = ask_in_part(scene, rng)
    assert parse(say(asked, rng)) == asked
    text = caption_in_part(scene, rng)
    asked = parse(text)
    assert asked != AskedScene.of(scene) and shows(scene, asked)
    assert parse(text.upper()) == asked == parse(text.lower())


def shows(scene: Scene, asked: AskedScene) -> bool:
    """Say in plain words whether a scene shows what is asked."""

    def fits(thing: Thing, want: AskedThing) -> bool:
        leaves = want.color in (None, thing.color) and want.size in (None, thing.size)
        return thing.shape == want.shape and leaves

    def all_fit(things: tuple[Thing, ...]) -> bool:
        return all(map(fits, things, asked.things))

    if asked.background not in (None, scene.background):
        return False
    if asked.layout is None:
        return any(map(all_fit, permutations(scene.things, len(asked.things))))
    return asked.layout == scene.layout and all_fit(scene.things)


def every_scene() -> list[Scene]:
    """All scenes of two things."""
    things = [Thing(*t) for t in product(COLORS, SHAPES, SIZES)]
    two = [name for name, centres in LAYOUTS.items() if len(centres) == 2]
    return [Scene(t, k, b) for t in product(things, things) for k in two for b in BACKGROUNDS]


@pytest.mark.parametrize(
    "asked",
    [
        AskedScene((RED, BLUE), "row", "grey"),
        AskedScene((RED, BLUE), "row", None),
        AskedScene((RED, RED), None, "grey"),
        AskedScene((CIRCLE, BLUE), "column", None),
        AskedScene((RED.without("size"), RED.without("color")), None, None),
        AskedScene((RED,), None, None),
        AskedScene((CIRCLE,), None, "white"),
    ],
)
def test_completions_are_all_scenes_that_show_what_is_asked(asked: AskedScene) -> None:
    assert set(completions(asked)) == {scene for scene in every_scene() if shows(scene, asked)}


def test_completions_may_have_more_things_where_no_relation_is_asked() -> None:
    found = list(completions(AskedScene((RED, BLUE), None, "grey"), 3))
    assert {len(scene.things) for scene in found} == {2, 3}
    assert all(shows(scene, AskedScene((RED, BLUE), None, "grey")) for scene in found)
    three = list(completions(AskedScene((RED, BLUE, RED), "one above two", None), 3))
    assert [scene.background for scene in three] == list(BACKGROUNDS)


@given(SEEDS, MOST)
def test_a_drawn_completion_shows_what_is_asked(seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    asked = ask_in_part(sample_scene(rng, most), rng)
    scene = complete(asked, rng, most)
    assert shows(scene, asked) and len(scene.things) <= most


def test_completions_are_drawn_alike() -> None:
    rng = np.random.default_rng(0)
    asked = AskedScene((RED.without("size"), BLUE), "row", None)
    drawn = [complete(asked, rng) for _ in range(1200)]
    counts = [drawn.count(scene) for scene in completions(asked)]
    assert len(counts) == 6 and min(counts) > 150 and max(counts) < 250  # 200 +- 13 each


def test_every_omission_occurs_also_alone() -> None:
    rng = np.random.default_rng(0)
    found = [ask_in_part(WHOLE, rng) for _ in range(500)]
    lacking = {
        (
            asked.background is None,
            any(thing.size is None for thing in asked.things),
            any(thing.color is None for thing in asked.things),
            asked.layout is None and len(asked.things) == 2,
            len(asked.things) == 1,
        )
        for asked in found
    }
    assert {tuple(i == k for i in range(5)) for k in range(len(OMITTED))} <= lacking
    assert (False,) * 5 not in lacking


def test_captions_in_part_are_written_in_several_manners() -> None:
    rng = np.random.default_rng(0)
    texts = {caption_in_part(WHOLE, rng) for _ in range(600)}
    assert any(t[0] == "A" and t[1:].islower() for t in texts) and any(map(str.isupper, texts))
    assert any("RED" in t and "circle" in t for t in texts)
    assert any("red small circle" in t for t in texts) and any(t.endswith(".") for t in texts)
    assert any("a small red circle and a large blue square" in t for t in texts)
    assert "a small red circle left of a large blue square" in texts


def test_the_first_prompt_of_everyone_is_read() -> None:
    asked = parse("A small red circle above a large BLUE square.")
    assert asked == AskedScene((RED, BLUE), "column", None)
    assert parse("a large blue square below a red small circle") == asked


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a red dog above a blue square", "none of scenes"),
        ("", "none of scenes"),
        ("a red circle near a blue square", "none of scenes"),
        ("a red circle above", "none of scenes"),
        ("a red blue circle above a square", "two colours or sizes of a circle"),
        ("a red circle on black, grey background", "none of scenes"),
    ],
)
def test_other_texts_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(text)

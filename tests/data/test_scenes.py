"""The embedded scenes: exact by seed, honest about what is held out, drawn as described."""

import itertools

import numpy as np
import pytest

from data.scenes import (
    BACKGROUNDS,
    COLORS,
    LAYOUTS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    caption,
    draw_scene,
    is_heldout,
    place,
    sample_scene,
    scenes,
)


def test_a_sample_depends_on_its_seed_split_and_number_alone():
    first, again = list(scenes("train", 5)), list(scenes("train", 9))
    for a, b in zip(first, again, strict=False):
        assert a["key"] == b["key"] and a["caption"] == b["caption"]
        assert np.array_equal(a["image"], b["image"]) and a["attributes"] == b["attributes"]
    other = list(scenes("train", 5, seed=1))
    assert any(a["caption"] != b["caption"] for a, b in zip(first, other, strict=True))
    keys = {s["key"] for split in ("train", "val", "heldout") for s in scenes(split, 5)}
    assert len(keys) == 15


def test_heldout_combinations_are_a_tenth_and_never_in_train_or_val():
    for split in ("train", "val", "heldout"):
        shown = [Scene.from_attributes(s["attributes"]) for s in scenes(split, 300)]
        assert {is_heldout(scene) for scene in shown} == {split == "heldout"}
    rng = np.random.default_rng(0)
    share = np.mean([is_heldout(sample_scene(rng)) for _ in range(5000)])
    assert share == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("max_objects", [2, 3, 4])
def test_things_lie_inside_the_picture_and_never_touch(max_objects):
    rng = np.random.default_rng(max_objects)
    for _ in range(500):
        scene = sample_scene(rng, max_objects)
        centres = place(scene, rng)
        half = np.array([SIZES[t.size] for t in scene.things])
        assert (centres - half[:, None] > 0).all() and (centres + half[:, None] < 1).all()
        for i, j in itertools.combinations(range(len(half)), 2):
            assert np.abs(centres[i] - centres[j]).max() > half[i] + half[j]


def test_the_picture_shows_colour_size_and_background():
    for color, shape, size, background in itertools.product(COLORS, SHAPES, SIZES, BACKGROUNDS):
        things = (Thing(color, shape, size), Thing("red", "circle", "small"))
        picture = draw_scene(Scene(things, "row", background), np.array(LAYOUTS["row"]))
        assert tuple(picture[0, 0]) == BACKGROUNDS[background]
        assert tuple(picture[16, 8]) == COLORS[color]  # the first thing's centre


def test_areas_are_those_of_the_shapes():
    # coverage is anti-aliased, so sums of pixels are areas
    ground, resolution = 18, 128
    for shape, area in {"circle": np.pi, "square": 4 * 0.9**2, "triangle": 2.0}.items():
        for size, half in SIZES.items():
            scene = Scene((Thing("red", shape, size), Thing("red", shape, "small")), "row", "black")
            picture = draw_scene(scene, np.array(LAYOUTS["row"]), resolution).astype(float)
            left = picture[:, : resolution // 2, 0]
            covered = ((left - ground) / (COLORS["red"][0] - ground)).sum()
            assert covered == pytest.approx(area * (half * resolution) ** 2, rel=0.02)


def test_captions_name_everything_in_either_order():
    rng = np.random.default_rng(0)
    things = (Thing("red", "circle", "small"), Thing("blue", "square", "large"))
    row = {caption(Scene(things, "row", "grey"), rng) for _ in range(200)}
    assert len(row) == 16  # two orders, two relations each, four phrasings
    for text in row:
        assert "small red circle" in text and "large blue square" in text and "grey" in text
        first = text.index("small red circle") < text.index("large blue square")
        assert ("left of" in text) == first and ("right of" in text) != first


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="not 'test'"):
        next(scenes("test", 1))
    with pytest.raises(ValueError, match="max_objects must be 2, 3 or 4, got 5"):
        sample_scene(np.random.default_rng(0), 5)

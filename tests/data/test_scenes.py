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
    SPLITS,
    Scene,
    Thing,
    caption,
    draw_scene,
    is_heldout,
    place,
    sample_scene,
    scene_masks,
    scenes,
)


def test_a_sample_depends_on_its_seed_split_and_number_alone():
    first, again = list(scenes("train", 5)), list(scenes("train", 9))
    for a, b in zip(first, again, strict=False):
        assert a["key"] == b["key"] and a["caption"] == b["caption"]
        assert np.array_equal(a["image"], b["image"]) and a["attributes"] == b["attributes"]
    other = list(scenes("train", 5, seed=1))
    assert any(a["caption"] != b["caption"] for a, b in zip(first, other, strict=True))
    samples = [s for split in SPLITS for s in scenes(split, 5)]
    assert len({s["key"] for s in samples}) == len({s["image"].tobytes() for s in samples}) == 25


def test_a_new_split_changes_no_other():
    """A split's number seeds its samples, and measured scores are of these samples."""
    assert [next(scenes(split, 1))["caption"] for split in SPLITS] == [
        "on a black background, a large cyan square to the left of a small green circle",
        "a large yellow triangle left of a large yellow circle on a white background",
        "a large yellow square to the left of a small purple circle on a white background",
        "on a black background, a large yellow triangle above a small cyan triangle",
        "a small red triangle above a large green square, white background",
    ]


def test_heldout_combinations_are_a_tenth_and_never_in_train_or_val():
    for split in SPLITS:
        shown = [Scene.from_attributes(s["attributes"]) for s in scenes(split, 300)]
        assert {is_heldout(scene) for scene in shown} == {"heldout" in split}
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


@pytest.mark.parametrize("resolution", [32, 64])
def test_masks_are_where_the_things_are(resolution: int):
    """At the resolution of the picture: the colour of the thing inside, of the ground outside."""
    for sample in scenes("val", 30, resolution=resolution, max_objects=4):
        shown, image = sample["attributes"], sample["image"].astype(int)
        owner, half = scene_masks(shown, resolution, resolution)
        assert owner.shape == (resolution, resolution)
        colors = [BACKGROUNDS[shown["background"]], *(COLORS[t["color"]] for t in shown["things"])]
        for number, color in enumerate(colors):
            wrong = np.abs(image - color).max(axis=2)[owner == number]
            # pixels on the edge are mixed; a pixel whose centre is inside is mostly the thing's
            assert (wrong == 0).mean() > 0.5 and wrong.size > 10
            for other in (c for c in colors if c != color):
                assert np.abs(image - other).max(axis=2)[owner == number].min() > 0
        assert ((half > 0) == (owner > 0)).all()
        for number, thing in enumerate(shown["things"], 1):
            rows = np.nonzero((owner == number) & (half == 1))[0]
            assert (rows + 0.5 < thing["centre"][1]).all()
            rows = np.nonzero((owner == number) & (half == 2))[0]
            assert (rows + 0.5 >= thing["centre"][1]).all()


def test_masks_on_a_coarser_grid_are_those_of_the_cell_centres():
    shown = next(iter(scenes("val", 1)))["attributes"]
    fine, _ = scene_masks(shown, 32, 96)  # cell centres of 32 are among those of 96
    assert np.array_equal(scene_masks(shown, 32, 32)[0], fine[1::3, 1::3])

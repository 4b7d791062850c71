"""Scenes are drawn as described."""

import itertools

import numpy as np
import pytest

from data.scene_drawing import (
    BACKGROUNDS,
    COLORS,
    LAYOUTS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    draw_scene,
    place,
    sample_scene,
    scene_masks,
)
from data.scenes import scenes


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


def test_too_many_things_are_refused():
    with pytest.raises(ValueError, match="max_objects must be 2, 3 or 4, got 5"):
        sample_scene(np.random.default_rng(0), 5)

"""Squares are cut as the released definitions say, and drawn ones lie where they may."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.crops import CROPS, box_of

NAMED = {
    "adm": "adm",
    "crop_first": "center",
    "tv_bicubic": "resize_bicubic",
    "tv_bilinear": "resize_bilinear",
    "tv_lanczos": "resize_lanczos",
}


def cut(name: str, image: Image.Image, size: int, seed: int = 0) -> np.ndarray:
    return np.asarray(CROPS[name].cut(image, size, random.Random(seed)))


@pytest.mark.golden
def test_golden_center_crop(golden: Callable) -> None:
    case = golden("evaluation/center_crop")
    size, images = case.config["size"], [n for n in case.io if n.endswith(".image")]
    assert images
    for name in images:
        image = Image.fromarray(case.io[name].numpy())
        for kind in [n for n in case.io if n.startswith(name[: -len("image")]) and n != name]:
            made = cut(NAMED[kind.rpartition(".")[2]], image, size)
            far = np.abs(made.astype(int) - case.io[kind].numpy().astype(int))
            assert far.max() <= 1 and (far > 0).mean() < 0.01, kind


def ramp(width: int, height: int) -> Image.Image:
    """A picture whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([columns, rows, rows], -1))


SIDES = st.tuples(st.integers(8, 120), st.integers(8, 120))


@given(sides=SIDES, size=st.integers(8, 64), seed=st.integers(0, 99))
def test_every_crop_is_a_square_of_that_size_and_follows_its_seed(sides, size, seed) -> None:
    image = ramp(*sides)
    for name, rule in CROPS.items():
        made = cut(name, image, size, seed)
        assert made.shape == (size, size, 3)
        np.testing.assert_array_equal(made, cut(name, image, size, seed))
        shown = rule.seen
        np.testing.assert_array_equal(cut(shown, image, size, 0), cut(shown, image, size, seed))


@given(width=st.integers(30, 250), seed=st.integers(0, 999))
def test_random_crops_lie_anywhere_along_the_long_side(width: int, seed: int) -> None:
    made = cut("random", ramp(width, 30), 30, seed)
    left = int(made[0, 0, 0])
    assert left <= width - 30
    np.testing.assert_array_equal(made, np.asarray(ramp(width, 30))[:, left : left + 30])


def test_dalle_cuts_near_the_centre_and_enlarges_a_little() -> None:
    """In 3/8 to 5/8 of the slack; from 32 to 36 pixels, of which 32 are kept."""
    wide, tall = ramp(132, 36), ramp(36, 132)
    lefts, steps = set(), set()
    for seed in range(300):
        made = cut("dalle", wide, 32, seed).astype(int)
        turned = cut("dalle", tall, 32, seed).astype(int)
        for first, last in (
            (made[16, 1, 0], made[16, -2, 0]),
            (turned[1, 16, 1], turned[-2, 16, 1]),
        ):
            lefts.add(first)
            steps.add(round((last - first) / 29, 2))
    assert min(lefts) >= 3 * 96 // 8 and max(lefts) <= 5 * 96 // 8 + 4 + 2
    assert min(lefts) < 40 and max(lefts) > 58
    assert 1.0 in steps and max(steps) > 1.1  # 36 of 36, and 36 reduced to 32
    small = cut("dalle", ramp(20, 20), 32)  # enlarged to just 32
    np.testing.assert_array_equal(small, cut("center", ramp(20, 20), 32))


@pytest.mark.parametrize("name", CROPS)
def test_an_extreme_shape_costs_no_memory(name: str) -> None:
    assert cut(name, Image.new("RGB", (60_000, 1)), 256).shape == (256, 256, 3)


@settings(deadline=None)
@given(
    sides=st.tuples(st.integers(16, 250), st.integers(16, 250)),
    seed=st.integers(0, 99),
    name=st.sampled_from(sorted(CROPS)),
)
def test_the_box_of_a_crop_is_where_it_was_cut(sides, seed, name) -> None:
    """The ramp's values say where, up to filters, and odd pixels that halving drops."""
    size = 16
    left, top, right, bottom = box_of(name, sides, size, random.Random(seed))
    assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
    made = cut(name, ramp(*sides), size, seed).astype(float)
    columns = left * sides[0] + (np.arange(size) + 0.5) * (right - left) * sides[0] / size - 0.5
    rows = top * sides[1] + (np.arange(size) + 0.5) * (bottom - top) * sides[1] / size - 0.5
    inner = slice(3, -3)
    assert np.abs(made[8, inner, 0] - columns[inner]).max() <= 2 + 0.03 * sides[0]
    assert np.abs(made[inner, 8, 1] - rows[inner]).max() <= 2 + 0.03 * sides[1]

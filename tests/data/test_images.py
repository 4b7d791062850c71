"""Any web image becomes an upright RGB square."""

import io
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.images import Crop, adm_crop, decode_image, join, stack, to_tensor
from data.select import decoded, visited
from data.view import View


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def halves(width: int = 40, height: int = 40) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), (255, 0, 0))
    image.paste((0, 0, 255), (width // 2, 0, width, height))
    return image


def test_a_picture_of_the_right_size_is_unchanged() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(pixels)), 16), pixels)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_formats(kind: str) -> None:
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
    decoded = decode_image(encoded(halves(), kind, **options), 20)
    assert decoded.shape == (20, 20, 3) and decoded.dtype == np.uint8
    assert np.abs(decoded[:, :6].astype(int) - (255, 0, 0)).max() < 12
    assert np.abs(decoded[:, -6:].astype(int) - (0, 0, 255)).max() < 12


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 200 * 257, (200, 200, 200)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("LA", (0, 0), (255, 255, 255)),
    ],
)
def test_modes_of_png(mode: str, colour, expected: tuple[int, int, int]) -> None:
    decoded = decode_image(encoded(Image.new(mode, (10, 10), colour)), 8)
    np.testing.assert_array_equal(decoded, np.broadcast_to(expected, (8, 8, 3)))


def test_palette_with_a_transparent_colour_becomes_white() -> None:
    image = halves().quantize(2)
    image.info["transparency"] = image.getpixel((0, 0))
    decoded = decode_image(encoded(image), 20)
    assert decoded[10, 2].tolist() == [255, 255, 255]
    assert decoded[10, 17].tolist() == [0, 0, 255]


def test_cmyk_keeps_its_colours() -> None:
    decoded = decode_image(encoded(halves().convert("CMYK"), "JPEG", quality=95), 20)
    assert decoded[10, 2, 0] > 230 and decoded[10, 2, 2] < 25
    assert decoded[10, 17, 2] > 230 and decoded[10, 17, 0] < 25


def test_exif_rotation_is_undone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    turned = halves().transpose(Image.Transpose.ROTATE_180)
    decoded = decode_image(encoded(turned, "JPEG", exif=exif, quality=95, subsampling=0), 20)
    assert decoded[10, 2, 0] > 230 and decoded[10, 17, 2] > 230


def test_the_centre_is_cut() -> None:
    wide = Image.new("RGB", (30, 10), "black")
    wide.paste("white", (10, 0, 20, 10))
    assert decode_image(encoded(wide), 10).min() == 255
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    assert decode_image(encoded(tall), 10).min() == 255


@given(seed=st.integers(0, 1000))
def test_random_crops_lie_within_and_repeat_by_seed(seed: int) -> None:
    ramp = np.broadcast_to(np.arange(60, dtype=np.uint8)[None, :, None], (20, 60, 3))
    data = encoded(Image.fromarray(np.ascontiguousarray(ramp)))
    one = decode_image(data, 20, crop="random", rng=random.Random(seed))
    two = decode_image(data, 20, crop="random", rng=random.Random(seed))
    np.testing.assert_array_equal(one, two)
    left = int(one[0, 0, 0])
    assert 0 <= left <= 40
    np.testing.assert_array_equal(one, ramp[:, left : left + 20])


def test_a_mirror_turns_left_and_right() -> None:
    data = encoded(halves())
    np.testing.assert_array_equal(
        decode_image(data, 8, mirror=True), decode_image(data, 8)[:, ::-1]
    )


@pytest.mark.parametrize("crop", ["center", "adm"])
def test_an_extreme_shape_costs_no_memory(crop: Crop) -> None:
    line = encoded(Image.new("RGB", (60_000, 1)))
    assert decode_image(line, 256, crop=crop).shape == (256, 256, 3)


def test_the_crop_of_adm_keeps_the_centre_in_training_and_validation() -> None:
    wide = Image.new("RGB", (95, 33), "black")
    wide.paste("white", (29, 0, 66, 33))
    assert adm_crop(wide, 16).size == (16, 16)
    assert np.asarray(adm_crop(wide, 16)).min() == 255
    sample = {"data": encoded(wide), "captions": [""], "key": "0", "meta": {}}
    view = View(16, crop="adm")
    pixels = [s["pixels"] for s in (decoded(sample, view), visited(sample, view, "0", flip=False))]
    np.testing.assert_array_equal(*pixels)
    np.testing.assert_array_equal(pixels[0], np.asarray(adm_crop(wide, 16)))


def test_enlarged_and_reduced_keep_the_mean() -> None:
    image = halves(64, 64)
    for resolution in (16, 32, 128):
        mean = decode_image(encoded(image), resolution).mean(axis=(0, 1))
        np.testing.assert_allclose(mean, (127.5, 0, 127.5), atol=3)


def test_tensors_span_minus_one_to_one() -> None:
    pixels = np.array([[[0, 255, 51]]], np.uint8)  # [1, 1, 3]
    torch.testing.assert_close(to_tensor(pixels).flatten(), torch.tensor([-1.0, 1.0, -0.6]))


def test_batches_carry_labels_only_where_all_have_one() -> None:
    sample = {"pixels": np.zeros((4, 4, 3), np.uint8), "caption": "a", "key": "k", "label": 3}
    bare = {name: value for name, value in sample.items() if name != "label"}
    batch = join([stack([sample, sample]), stack([sample])])
    assert batch["image"].shape == (3, 3, 4, 4) and batch["image"].max() == -1
    assert batch["label"].tolist() == [3, 3, 3] and batch["key"] == ["k"] * 3
    for parts in ([stack([sample, bare])], [stack([sample]), stack([bare])]):
        assert set(join(parts)) == {"image", "caption", "key"}

"""Any web image becomes an upright RGB square."""

import io
import random
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data.images
from data.crops import adm
from data.images import CORRUPT, TRUNCATED, decode_image, join, stack, to_rgb, to_tensor
from data.select import decoded, visited
from data.skips import SampleError
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


def many_sizes() -> list[bytes]:
    rng = np.random.default_rng(0)
    sizes = [(512, 512), (700, 512), (400, 900), (256, 256), (100, 300)]
    coarse = [Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)) for _ in sizes]
    pictures = [
        c.resize(size, Image.Resampling.BICUBIC) for c, size in zip(coarse, sizes, strict=True)
    ]
    return [encoded(picture, "JPEG", quality=95) for picture in pictures]


def test_a_reduced_decoding_looks_the_same_and_never_enlarges(monkeypatch) -> None:
    """Where every pixel counts nothing is reduced."""
    sizes: list[tuple[int, int]] = []
    monkeypatch.setattr(
        data.images, "to_rgb", lambda image: (sizes.append(image.size), to_rgb(image))[1]
    )
    for jpeg in many_sizes():
        whole = Image.open(io.BytesIO(jpeg)).size
        for crop, least in {"center": 256, "dalle": 288, "adm": 10**6}.items():
            plain, fast = (
                decode_image(jpeg, 256, crop=crop, rng=random.Random(0), reduced=reduced).astype(
                    float
                )
                for reduced in (False, True)
            )
            assert np.abs(plain - fast).mean() < 1.5
            assert sizes[-2] == whole and min(sizes[-1]) >= min(least, *whole)
            if least < min(whole) // 2:
                assert sizes[-1] != whole


def test_avif_and_the_first_frame_of_an_animation() -> None:
    assert decode_image(encoded(halves(), "AVIF", quality=90), 20)[10, 2, 0] > 230
    for kind in ("WEBP", "PNG", "AVIF"):
        moving = encoded(halves(), kind, save_all=True, append_images=[Image.new("RGB", (40, 40))])
        assert decode_image(moving, 20)[10, 2, 0] > 230


def test_sixteen_bits_of_colour_become_eight() -> None:
    wide = np.zeros((4, 4, 3), np.uint16)
    wide[..., 0] = 200 * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)

    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4) + name + body + zlib.crc32(name + body).to_bytes(4)

    header = (4).to_bytes(4) * 2 + bytes([16, 2, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    png += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert decode_image(png, 4).tolist() == [[[200, 0, 0]] * 4] * 4


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda jpeg: jpeg[: len(jpeg) // 2], TRUNCATED),
        (lambda jpeg: b"not an image", CORRUPT),
        (lambda jpeg: b"", CORRUPT),
        (lambda jpeg: b"GIF89a" + jpeg, CORRUPT),
    ],
)
def test_what_cannot_be_decoded_has_a_kind(spoil, kind: str) -> None:
    with pytest.raises(SampleError, match=kind):
        decode_image(spoil(many_sizes()[0]), 8)


def test_the_crop_of_adm_keeps_the_centre_in_training_and_validation() -> None:
    wide = Image.new("RGB", (95, 33), "black")
    wide.paste("white", (29, 0, 66, 33))
    assert adm(wide, 16).size == (16, 16)
    assert np.asarray(adm(wide, 16)).min() == 255
    sample = {"data": encoded(wide), "captions": [""], "key": "0", "meta": {}}
    view = View(16, crop="adm")
    pixels = [s["pixels"] for s in (decoded(sample, view), visited(sample, view, "0", flip=False))]
    np.testing.assert_array_equal(*pixels)
    np.testing.assert_array_equal(pixels[0], np.asarray(adm(wide, 16)))


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

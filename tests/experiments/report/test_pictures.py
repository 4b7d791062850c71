"""Pictures survive their files; sheets show every pixel and every caption."""

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.report.pictures import grid, legible, load_png, save_png, strip, to_uint8


def noise(count: int, side: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator).to(torch.uint8)


def test_rounding_of_pictures() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1 / 255, 1.0, 3.0])
    assert to_uint8(values).tolist() == [0, 0, 128, 128, 255, 255]
    every = torch.arange(256)
    assert torch.equal(to_uint8(every / 127.5 - 1).long(), every)


def test_png_keeps_pixels_and_text(tmp_path: Path) -> None:
    picture = noise(1)[0]
    text = {"prompt": "ein größerer Kreis, 赤い円", "seed": "3", "settings": '{"steps": 12}'}
    save_png(tmp_path / "a" / "x.png", picture, text)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.png"]
    found, said = load_png(tmp_path / "a" / "x.png")
    assert torch.equal(found, picture) and said == text
    save_png(tmp_path / "y.png", picture, {"seed": "3"})
    assert b"tEXtseed\x003" in (tmp_path / "y.png").read_bytes()
    with pytest.raises(ValueError, match="uint8"):
        save_png(tmp_path / "z.png", picture.float())
    assert not (tmp_path / "z.png").exists()


def test_grid_enlarges_by_whole_factors_and_makes_room_for_captions() -> None:
    images = noise(5)
    sheet = np.array(grid(images, 3, 4))
    assert sheet.shape == (2 * 38 + 6, 3 * 38 + 6, 3)
    assert np.array_equal(sheet[6:38:4, 44:76:4], images[1].permute(1, 2, 0).numpy())
    assert np.array_equal(sheet[9:38:4, 47:76:4], images[1].permute(1, 2, 0).numpy())
    assert grid(images, 8, 1).width == 5 * 14 + 6
    plain, said = grid(images, 5, 8), grid(images, 5, 8, ["a word"] * 4 + ["many words " * 9])
    assert said.height > plain.height and said.width == plain.width
    below = np.array(said)[6 + 64 :, :70]
    assert (below < 128).any()  # ink
    with pytest.raises(ValueError, match="at least one"):
        grid(images[:0], 2)
    with pytest.raises(ValueError, match="as many captions"):
        grid(images, 2, captions=["a"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("größer, красный Ω → ½", "größer, красный Ω → ½"),
        ("빨간 원 a", "[bbal gan] [weon] a"),
        ("赤い円", "[8d64 i 5186]"),
        ("a ❤ and 🦄🏽", "a ❤ and [unicorn face emoji modifier fitzpatrick type-4]"),
        ("\0\ue000", "[u+0000 u+e000]"),
        ("a\u200b", "a\u200b"),
    ],
)
def test_captions_name_what_the_font_lacks(text: str, shown: str) -> None:
    assert legible(text) == shown


def test_different_characters_without_a_glyph_look_different() -> None:
    one, other = (grid(noise(1), 1, 16, [text]) for text in ("빨", "간"))
    assert one.tobytes() != other.tobytes()


def test_strip_shows_pictures_and_changed_tokens() -> None:
    steps, changed = noise(5), torch.zeros(5, 4, 4, dtype=torch.bool)
    changed[1, 0, 3] = True
    sheet = np.array(strip(steps, changed, columns=5))
    side, label, gap = 96, 13, 6
    first = sheet[label : label + side : 12, :side:12, :3]
    assert np.array_equal(first, steps[0].permute(1, 2, 0).numpy())
    tokens = sheet[label + side + 4 :, side + gap : 2 * side + gap]
    marked = tokens[..., 3] == 255
    assert marked[:24, 72:].all() and marked.sum() == 24 * 24
    assert strip(steps, changed).width < sheet.shape[1]

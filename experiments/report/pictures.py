"""Pictures as files and sheets: PNG with text, grids of pictures, the steps of a sampling."""

import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from textwrap import wrap

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from data.files import atomic

GAP = 6
LINE = 13
INK, GROUND = (40, 44, 52), (255, 255, 255)
# readable on white and on black alike
GREY = (128, 128, 128, 255)
TOKENS = np.array([(128, 128, 128, 70), (217, 119, 40, 255)], np.uint8)  # same, changed


def to_uint8(images: Tensor) -> Tensor:
    """Round images [..., H, W] in [-1, 1] to uint8: 127.5 x + 127.5, clamped to 0..255."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def to_image(picture: Tensor) -> Image.Image:
    """Make a PIL image of a picture [3, H, W] uint8.

    Raises:
        ValueError: another type or shape.
    """
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(f"a picture is uint8 [3, H, W], got {picture.dtype} {list(picture.shape)}")
    return Image.fromarray(picture.cpu().permute(1, 2, 0).contiguous().numpy())


def to_pixels(image: Image.Image) -> Tensor:
    """Make a picture uint8 [3, H, W] of a PIL image."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def save_png(
    path: Path | str, picture: Tensor | Image.Image, text: Mapping[str, str] | None = None
) -> None:
    """Write a picture as PNG; the file appears whole or not at all.

    Args:
        path: the file.
        picture: uint8 [3, H, W], or a PIL image.
        text: stored in the file by keyword (prompt, seed, ...): tEXt where Latin-1 holds it,
            else iTXt in UTF-8.
    """
    image = to_image(picture) if isinstance(picture, Tensor) else picture
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    with atomic(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def load_png(path: Path | str) -> tuple[Tensor, dict[str, str]]:
    """Read a PNG as uint8 [3, H, W] with the text stored in it."""
    with Image.open(path, formats=["PNG"]) as image:
        text = {str(k): str(v) for k, v in getattr(image, "text", {}).items()}
        return to_pixels(image), text


def enlarge(image: Image.Image, least: int) -> Image.Image:
    """Enlarge by the smallest whole factor that makes the short side at least `least` pixels.

    Pixels stay squares; nothing is smoothed.
    """
    factor = max(1, -(-least // min(image.size)))
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.NEAREST) if factor > 1 else image


def grid(
    images: Tensor,
    columns: int,
    scale: int | None = None,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Lay pictures out row by row.

    Args:
        images: [N, 3, H, W] uint8, N >= 1.
        columns: pictures in a row.
        scale: whole factor of enlargement; default makes the short side at least 128 pixels.
        captions: one per picture, written below it as `legible` makes them.

    Raises:
        ValueError: no pictures, or another number of captions.
    """
    if len(images) == 0:
        raise ValueError("a grid needs at least one picture")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(images)} pictures need as many captions, got {len(captions)}")
    cells = [to_image(picture) for picture in images]
    if scale is None:
        cells = [enlarge(cell, 128) for cell in cells]
    else:
        size = (cells[0].width * scale, cells[0].height * scale)
        cells = [cell.resize(size, Image.Resampling.NEAREST) for cell in cells]
    width, height = cells[0].size
    columns, font = min(columns, len(cells)), _font(10)
    texts = [  # a letter is 6 pixels wide on average
        wrap(legible(caption), max(4, width // 6), max_lines=6, placeholder=" ...")
        for caption in captions or [""] * len(cells)
    ]
    rows = [slice(i, i + columns) for i in range(0, len(cells), columns)]
    below = [LINE * max(map(len, texts[row])) + 4 if captions else 0 for row in rows]
    size = (columns * (width + GAP) + GAP, sum(height + GAP + b for b in below) + GAP)
    sheet = Image.new("RGB", size, GROUND)
    pen, y = ImageDraw.Draw(sheet), GAP
    for row, room in zip(rows, below, strict=True):
        for i, (cell, text) in enumerate(zip(cells[row], texts[row], strict=True)):
            x = GAP + i * (width + GAP)
            sheet.paste(cell, (x, y))
            for j, line in enumerate(text):
                pen.text((x, y + height + 2 + j * LINE), line, INK, font)
        y += height + GAP + room
    return sheet


def strip(
    steps: Tensor,
    changed: Tensor | None = None,
    columns: int = 4,
    numbers: Sequence[int] | None = None,
) -> Image.Image:
    """Show how a picture comes about: after every step the picture and the tokens that changed.

    Args:
        steps: [T, 3, H, W] uint8, the decoded tokens after each step.
        changed: [T, h, w] bool, tokens that this step changed; None leaves the tokens out.
        columns: steps in a row.
        numbers: T numbers of the steps; default counts from 1.

    Returns:
        An image with transparent ground, so that it fits light and dark pages.
    """
    cells = [enlarge(to_image(picture), 96) for picture in steps]
    width, height = cells[0].size
    tall = LINE + height + (0 if changed is None else height + 4)
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    size = (columns * (width + GAP) - GAP, rows * (tall + 3 * GAP) - 3 * GAP)
    sheet = Image.new("RGBA", size, (0, 0, 0, 0))
    pen, font = ImageDraw.Draw(sheet), _font(10)
    named = zip(cells, numbers or range(1, len(cells) + 1), strict=True)
    for i, (cell, number) in enumerate(named):
        x, y = i % columns * (width + GAP), i // columns * (tall + 3 * GAP)
        pen.text((x, y - 1), f"step {number}", GREY, font)
        sheet.paste(cell, (x, y + LINE))
        if changed is not None:
            tokens = TOKENS[changed[i].long().cpu().numpy()]  # [h, w, 4]
            picture = Image.fromarray(tokens).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (x, y + LINE + height + 4))
    return sheet


def legible(text: str) -> str:
    """Name in brackets the characters that the font lacks: "[bbal gan] a" for Korean and an a."""
    parts = []
    for there, run in groupby(text, lambda c: c.isspace() or ord(c) in _drawable()):
        characters = "".join(run)
        named = [word for word in map(_word, characters) if word]
        parts.append(characters if there else f"[{' '.join(named)}]" if named else "")
    return "".join(parts)


def _word(character: str) -> str:
    """Return the last word of a letter's Unicode name, the whole name of a sign."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return ""  # it only changes how its neighbours look
    name = unicodedata.name(character, f"u+{ord(character):04x}").lower()
    letter = unicodedata.category(character) == "Lo"
    return name.rpartition(" ")[2].removeprefix("ideograph-") if letter else name


@cache
def _drawable() -> frozenset[int]:
    return frozenset(FT2Font(_font_file()).get_charmap())


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_file(), size)


def _font_file() -> str:
    # DejaVu Sans comes with matplotlib, as no font with Asian scripts does; Pillow's own stops at
    # ASCII
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")

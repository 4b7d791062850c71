"""MS-COCO as it is distributed: a folder of pictures per split, and a JSON of their captions.

2014 and 2017 hold the same pictures in other splits: mixed, pictures of training would be scored as
unseen ones, so a file of one is never read for the other.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.listing import Row, first_of, holds_pictures

SPLITS = ("train", "val")
HEAD = 2**16  # bytes of a JSON in which its version is looked for before it is read
NAMED_YEAR = re.compile(r"COCO_[a-z]+(\d{4})_")


def annotations(root: Path, split: str, year: int) -> Path:
    """Return the captions of a split.

    Raises:
        ValueError: they are not there, or of the other version.
    """
    name = f"captions_{split}{year}.json"
    other = f"captions_{split}{2014 + 2017 - year}.json"
    try:
        path = first_of(root, [f"annotations/{name}", name], f"the {split} split of coco{year}")
    except ValueError as error:
        if not any((root / place / other).exists() for place in ("annotations", ".")):
            raise
        raise ValueError(
            f"{error}; {other} is there, which is another version: data=coco{2014 + 2017 - year}"
        ) from None
    with open(path, "rb") as file:
        head = file.read(HEAD).decode(errors="replace")
    if not head.lstrip("\ufeff \t\r\n").startswith("{"):
        raise ValueError(f"{path} is no JSON of COCO: it does not begin with {{")
    told = re.search(r'"year"\s*:\s*(\d{4})', head)
    named = re.search(r'"file_name"\s*:\s*"([^"]*)"', head)
    _check_year(path, year, named[1] if named else "", int(told[1]) if told else None)
    return path


def _check_year(path: Path, year: int, file_name: str, told: int | None) -> None:
    """Refuse captions of the other version; names of 2014 say theirs, else "info" may."""
    named = NAMED_YEAR.match(file_name)
    found = int(named[1]) if named else told
    if found in (2014, 2017) and found != year:
        raise ValueError(
            f"{path} holds COCO {found}, not {year}: take data=coco{found}, or give the right file"
        )


def pictures_folder(root: Path, split: str, year: int) -> Path:
    """Return the folder that the pictures of a split lie in.

    Raises:
        ValueError: there is none, or none with a picture.
    """
    name = f"{split}{year}"
    places = [name, f"images/{name}", f"{name}/{name}"]
    for place in places:
        if holds_pictures(root / place):
            return root / place
    raise ValueError(
        f"the pictures of the {split} split are missing: no folder {' or '.join(places)} with "
        f"pictures in {root}"
    )


def index(root: Path, year: int) -> list[Path]:
    """Return the files and folders that say what the corpus holds.

    Raises:
        ValueError: one is missing, or of the other version.
    """
    texts = [annotations(root, split, year) for split in SPLITS]
    return texts + [pictures_folder(root, split, year) for split in SPLITS]


def rows(root: Path, year: int, faults: Counter[str]) -> Iterator[Row]:
    """Yield a row per picture with all its captions, those of training first.

    Args:
        root: with annotations and a folder per split.
        year: 2014 or 2017.
        faults: counts what of the JSON is left out.

    Raises:
        ValueError: a file that is missing, of the other version, or no captions of COCO.
    """
    for split in SPLITS:
        path = annotations(root, split, year)
        folder = pictures_folder(root, split, year).relative_to(root)
        for picture in read_captions(path, year, faults):
            file = picture["file_name"]
            size = {f"original_{k}": picture[k] for k in ("width", "height") if k in picture}
            meta = {**size, "image_id": picture["id"]}
            key, base = Path(file).stem, folder.as_posix()
            yield Row(key, file, picture["captions"], split, None, meta, base)


def read_captions(
    path: Path, year: int | None = None, faults: Counter[str] | None = None
) -> list[dict[str, Any]]:
    """Read a JSON of captions: {"id", "file_name", "captions" tuple} and, if given, its sides.

    White space of captions is made single; empty ones are left out.

    Args:
        path: captions_*.json.
        year: refuse another version than this.
        faults: counts the entries that are left out.

    Raises:
        ValueError: no JSON, no captions of COCO, or another version.
    """
    faults = Counter() if faults is None else faults
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no whole JSON: {error}; download it again") from error
    images, captions = (_get(content, name, list) for name in ("images", "annotations"))
    if images is None or captions is None:
        raise ValueError(f"{path} is no JSON of COCO: it lacks the lists images and annotations")
    pictures: dict[int, dict[str, Any]] = {}
    for image in images:
        number, name = _get(image, "id", int), _get(image, "file_name", str)
        if number is None or not name:
            faults[f"an image without id or file_name in {path.name}"] += 1
        elif number in pictures:
            faults[f"an image with the id of another in {path.name}"] += 1
        else:
            sides = {k: s for k in ("width", "height") if (s := _get(image, k, int)) is not None}
            pictures[number] = {"id": number, "file_name": name, **sides, "captions": []}
    for caption in captions:
        number, text = _get(caption, "image_id", int), _get(caption, "caption", str)
        if number not in pictures or text is None:
            faults[f"an annotation without caption or image in {path.name}"] += 1
        elif text.strip():
            pictures[number]["captions"].append(" ".join(text.split()))
    if not any(picture["captions"] for picture in pictures.values()):
        raise ValueError(f"{path} holds no picture with a caption")
    if year is not None:
        first = next(iter(pictures.values()))["file_name"]
        info = content.get("info")
        _check_year(path, year, first, _get(info, "year", int))
    return [{**picture, "captions": tuple(picture["captions"])} for picture in pictures.values()]


def _get(entry: Any, name: str, kind: type) -> Any:
    """Return a value of an entry, None where it is missing or of another type."""
    value = entry.get(name) if isinstance(entry, dict) else None
    return value if type(value) is kind else None

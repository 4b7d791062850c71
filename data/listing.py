"""Listings: shards of pictures that stay where they are, as rows of JSON that name their files.

The first line of NNNNN.jsonl holds the root, every further one a picture: key, file, all captions,
label and metadata where there are. Reading them gives what a tar with the same pictures would give.
No file is opened that lies outside of its folder, also not through a link.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from data.files import decode_text, write_text

PER_LISTING = 500
OUTSIDE, MISSING, UNREADABLE = "path outside the root", "missing file", "unreadable file"
IMAGE_KEYS = ("jpg", "jpeg", "png", "webp", "avif")  # endings of pictures
SUFFIXES = tuple(f".{key}" for key in IMAGE_KEYS)


@dataclass(frozen=True, slots=True)
class Row:
    """A picture of a corpus that lies in a file of its own."""

    key: str
    """Unique in the corpus."""
    file: str
    """Its path below `base`, with "/"; it may not lead out of there, also not through a link."""
    captions: tuple[str, ...] = ()
    """All that are said of it; none where they are missing."""
    split: str = ""
    """train, val or test as the corpus says; "" where it has no splits."""
    label: int | None = None
    """Its class, from 0."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What else is known, under the names of img2dataset."""
    base: str = ""
    """A folder below the root that the corpus's layout names; it may be a link to elsewhere."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", _readable_name(self.key))


def _readable_name(name: str) -> str:
    """Make UTF-8 of a name that is none: texts and tables hold no other."""
    return name.encode(errors="surrogatepass").decode(errors="backslashreplace")


def write_listings(
    rows: Iterable[Row], root: Path, folder: Path, per_listing: int = PER_LISTING
) -> list[str]:
    """Write rows as 00000.jsonl, 00001.jsonl, ... in the order of their keys' hashes.

    That order mixes the classes, so the first rows of a corpus are a fair part of it.

    Args:
        rows: of one split.
        root: the folder that their files lie below.
        folder: where to write.
        per_listing: rows in a listing; the last may hold fewer.

    Returns:
        The paths of the listings.
    """
    mixed = sorted(rows, key=lambda row: blake2b(row.key.encode(), digest_size=8).digest())
    head = json.dumps({"root": os.path.abspath(root)})
    paths = []
    for number, first in enumerate(range(0, len(mixed), per_listing)):
        path = folder / f"{number:05d}.jsonl"
        lines = [head, *map(_line, mixed[first : first + per_listing])]
        write_text(path, "\n".join(lines) + "\n")
        paths.append(str(path))
    return paths


def _line(row: Row) -> str:
    told: dict[str, Any] = {"key": row.key, "file": row.file, "caption": list(row.captions)}
    if row.label is not None:
        told["label"] = row.label
    more = {name: value for name in ("meta", "base") if (value := getattr(row, name))}
    return json.dumps({**told, **more})


def read_listing(url: str, first: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the raw samples of a listing from number `first` on, as a tar with its files would.

    Each names its own picture as where it was found.

    Raises:
        OSError: the listing cannot be read.
        ValueError: a line that `write_listings` did not write.
    """
    for root, row in islice(read_rows(url), first, None):
        meta = {**row.meta, "caption": list(row.captions)}
        if row.label is not None:
            meta["label"] = row.label
        suffix = row.file.rpartition(".")[2].lower()
        data, fault = _content(os.path.join(root, row.base), row.file)
        sample = {suffix: data, "json": json.dumps(meta).encode()}
        yield {
            **sample,
            **({"__fault__": fault} if fault else {}),
            "__key__": row.key,
            "__url__": _readable_name(os.path.join(root, row.base, row.file)),
        }


def _content(base: str, name: str) -> tuple[bytes | None, str]:
    """Return the bytes of a file below a folder, and why there are none."""
    try:
        path = inside(base, name)
        if path is None:
            return None, OUTSIDE
        with open(path, "rb") as file:
            return file.read(), ""
    except (FileNotFoundError, ValueError):  # a NUL, or half of a surrogate pair, is in no name
        return None, MISSING
    except OSError:
        return None, UNREADABLE


def count_listing(url: str) -> int:
    """Return how many pictures a listing names."""
    return sum(1 for _ in _readable(url))


def listing_keys(url: str) -> Iterator[str]:
    """Yield the key of every picture of a listing, as far as it can be read."""
    return (row.key for _, row in _readable(url))


def _readable(url: str) -> Iterator[tuple[str, Row]]:
    with suppress(OSError, ValueError):
        yield from read_rows(url)


def read_rows(url: str) -> Iterator[tuple[str, Row]]:
    """Yield root and row of every picture of a listing.

    Raises:
        ValueError: a line that `write_listings` did not write.
    """
    with open(url, encoding="utf-8") as file:
        try:
            root = json.loads(next(file, ""))["root"]
            for line in file:
                told = json.loads(line)
                captions = tuple(told["caption"])
                label, meta, base = told.get("label"), told.get("meta", {}), told.get("base", "")
                yield root, Row(told["key"], told["file"], captions, "", label, meta, base)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{url} is no listing of pictures: {error}") from error


def inside(root: str, name: str) -> str | None:
    """Return the path of a file below a root, None where it would lead out of it."""
    base = os.path.realpath(root)
    path = os.path.realpath(os.path.join(base, name))
    return path if path.startswith(base.rstrip(os.sep) + os.sep) else None


def is_picture(name: str) -> bool:
    """Say whether a file's name ends as a picture's, and does not begin with a dot."""
    return name.lower().endswith(SUFFIXES) and not os.path.basename(name).startswith(".")


def holds_pictures(folder: Path) -> bool:
    """Say whether a picture lies directly in a folder."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(is_picture(entry.name) for entry in entries)


def first_of(root: Path, names: Sequence[str], what: str) -> Path:
    """Return the first of several files or folders below a root that is there.

    Raises:
        ValueError: none is; the message names where it was looked for.
    """
    found = next((root / name for name in names if (root / name).exists()), None)
    if found is None:
        raise ValueError(f"{what} is missing: there is no {' or '.join(names)} in {root}")
    return found


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that say something, whatever its encoding.

    Raises:
        ValueError: it is no text.
    """
    data = path.read_bytes()
    try:
        text = decode_text(data)
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # the texts of old corpora
    except ValueError as error:
        raise ValueError(f"{path} is no text: {error}") from error
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]

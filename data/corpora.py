"""The corpora by name: what is known of each, where it lies below a root, and what it holds."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from data import coco, folders, ten_captions
from data.listing import Row
from data.names import corpora_yaml, split_of
from data.remote import is_remote, listed

FILTERS = (
    *("min_size", "min_aesthetic", "max_pwatermark", "max_punsafe"),
    *("min_caption", "max_caption"),
)
BROUGHT = (*FILTERS, "caption")  # settings of data that a corpus brings


@dataclass(frozen=True)
class Corpus:
    """What data/corpora.yaml says of a corpus."""

    name: str
    about: str
    kind: str
    licence: str
    access: str
    """Who gets it, and where."""
    download: str
    """The command that fetches it, or what else a person does."""
    splits: tuple[Mapping[str, str], ...] = ()
    filters: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    caption: str | None = None
    year: int = 0
    first_val: int | None = None
    labels: bool = False

    def settings(self, paper: str) -> dict[str, Any]:
        """Return the settings of data that the corpus brings, for a paper."""
        own = self.filters.get(paper, self.filters.get("any", {}))
        return {**dict.fromkeys(BROUGHT), **own, "caption": self.caption}

    @property
    def how_to_get(self) -> str:
        """What a person does who has not got it, in one line."""
        return f"to get it: {self.download} (access: {self.access})"


class Kind(NamedTuple):
    """How corpora of pictures in files of their own are read."""

    find: Callable[[Corpus, Path], list[Path]]
    """Files and folders that say what there is; ValueError: something is missing."""
    rows: Callable[[Corpus, Path, Counter[str]], Iterator[Row]]


KINDS: dict[str, Kind] = {
    "coco": Kind(lambda c, r: coco.index(r, c.year), lambda c, r, f: coco.rows(r, c.year, f)),
    "imagenet": Kind(
        lambda c, r: folders.imagenet_index(r), lambda c, r, f: folders.imagenet_rows(r, f)
    ),
    "folder": Kind(
        lambda c, r: folders.index(r),
        lambda c, r, f: folders.rows(r, f, labels=c.labels, first_val=c.first_val),
    ),
    "birds": Kind(
        lambda c, r: ten_captions.birds_index(r), lambda c, r, f: ten_captions.birds(r, f)
    ),
    "flowers": Kind(
        lambda c, r: ten_captions.flowers_index(r), lambda c, r, f: ten_captions.flowers(r, f)
    ),
}


@cache
def corpora() -> dict[str, Corpus]:
    """Return all corpora by name."""
    return {
        name: Corpus(name, **{**told, "splits": tuple(told.get("splits", ()))})
        for name, told in corpora_yaml()["corpora"].items()
    }


def index(name: str, root: str) -> list[Path]:
    """Return the files and folders that say what a corpus of pictures in files of their own holds.

    Raises:
        ValueError: no such folder, or something of the corpus is missing in it.
    """
    if is_remote(root):
        raise ValueError(f"{name} is read from a local folder, not from {root}")
    folder, found = Path(os.path.abspath(root)), corpora()[name]
    _check_root(name, folder)
    return KINDS[found.kind].find(found, folder)


def rows(name: str, root: Path, split: str, faults: Counter[str]) -> tuple[list[Row], bool]:
    """Return the pictures of a split, and whether the corpus itself says what the split holds.

    Where it does not, all pictures are returned. Where there is no validation split, test is it.

    Args:
        name: of the corpus.
        root: its folder.
        split: train or val.
        faults: counts what of its lists is left out.

    Raises:
        ValueError: something of the corpus is missing.
    """
    found = corpora()[name]
    everything = list(KINDS[found.kind].rows(found, root, faults))
    there = {row.split for row in everything}
    val = "val" if "val" in there else "test"
    if not {"train", val} <= there:
        return everything, False
    wanted = val if split == "val" else split
    return [row for row in everything if row.split == wanted], True


def shards(name: str, root: str) -> tuple[list[str], list[str] | None]:
    """Return the shards of training and of validation; None where the corpus has none of these.

    Raises:
        ValueError: no such folder, or nothing of the corpus in it.
    """
    found = corpora()[name]
    if not is_remote(root):
        _check_root(name, Path(root))
    if found.kind == "parquet":
        return _parquet(root)
    for pair in found.splits:
        files = {split: _matching(root, pattern) for split, pattern in pair.items()}
        if all(files.values()):
            return files["train"], files.get("val")
    looked = " or ".join(dict.fromkeys(pair["train"] for pair in found.splits))
    raise ValueError(f"no shard of {name} in {root}: there is no {looked}")


def _check_root(name: str, root: Path) -> None:
    if not root.is_dir():
        how = corpora()[name].how_to_get
        raise ValueError(f"there is no folder {root} to read {name} from; {how}")


def _matching(root: str, pattern: str) -> list[str]:
    """Return the files below a root that match a glob, sorted."""
    if is_remote(root):
        return listed(f"{root.rstrip('/')}/{pattern}")
    return sorted(map(str, Path(root).glob(pattern)))


def _parquet(root: str) -> tuple[list[str], list[str] | None]:
    """Return the parquet files of a folder by split, as `datasets` names them."""
    found: dict[str, list[str]] = {}
    for path in _matching(root, "**/*.parquet"):
        below = path.rpartition(root.rstrip("/").rpartition("://")[2])[2].split("/")
        found.setdefault(split_of(below), []).append(path)
    train, val = found.get("train") or found.get("", []), found.get("val") or found.get("test")
    if not train:
        have = ", ".join(sorted(filter(None, found))) or "no *.parquet"
        raise ValueError(f"no parquet file of a train split in {root}: there is {have}")
    return train, val

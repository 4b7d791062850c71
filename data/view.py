"""What a split holds, and how its samples become pictures: plain values, nothing heavy."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from data.files import write_json
from data.remote import is_remote

Crop = Literal[
    "center", "random", "adm", "dalle", "resize_bicubic", "resize_bilinear", "resize_lanczos"
]
MAX_SKIPPED = 0.2  # share of bad samples at which reading stops, where nobody says otherwise


@dataclass(frozen=True)
class View:
    """How a sample becomes a picture, and by which metadata it is left out."""

    resolution: int
    crop: Crop = "center"
    flip: bool = False
    seed: int = 0  # draws, with the key, the frozen crop of a cache and one of several captions
    min_size: int | None = None
    min_aesthetic: float | None = None
    max_pwatermark: float | None = None
    max_punsafe: float | None = None
    min_caption: int | None = None  # characters
    max_caption: int | None = None
    caption: str | None = None  # of pictures that have none


@dataclass(frozen=True)
class Order:
    """How training samples are read and shuffled."""

    workers: int = 0  # processes that read and decode; they change no order
    shuffle_buffer: int = 0  # samples of all ranks that are shuffled at a time


@dataclass(frozen=True)
class ShardList:
    """The samples of one split, in order."""

    paths: tuple[str, ...]
    holdout: float = 0.0  # share of the keys that are validation
    held_out: bool = False  # this split is those keys; else the others
    limit: int | None = None  # at most so many samples; a training split has no limit
    rows: tuple[int, ...] | None = None  # samples of every shard, see `data.shards.count_rows`

    def holds(self, key: str) -> bool:
        """Say whether the sample of this key belongs to the split."""
        return not self.holdout or is_held_out(key, self.holdout) == self.held_out

    def save(self, path: Path) -> None:
        """Write as JSON; shards below the file's folder are named relative to it, and may move."""
        folder = os.path.abspath(path.parent)
        paths = [p if is_remote(p) else os.path.abspath(p) for p in self.paths]
        below = [p.removeprefix(f"{folder}{os.sep}") for p in paths]
        write_json(path, {**asdict(self), "paths": below})

    @classmethod
    def load(cls, path: Path) -> "ShardList":
        """Read what `save` wrote."""
        content = json.loads(path.read_text())

        def whole(name: str) -> str:
            return name if is_remote(name) else str(path.parent / name)

        paths, rows = tuple(map(whole, content["paths"])), content.get("rows")
        return cls(**{**content, "paths": paths, "rows": rows and tuple(rows)})


def is_held_out(key: str, share: float) -> bool:
    """Say whether the sample of this key is validation: a hash of the key falls below `share`."""
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
    return number < share * 2**64

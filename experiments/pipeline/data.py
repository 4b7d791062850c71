"""The data of a run: shards of each split, their captions, and their pictures one by one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.config import EMBEDDED, DataConfig
from data.corpora import KINDS, corpora, index
from data.corpora import shards as shards_of
from data.files import write_json
from data.view import ShardList, View
from experiments.pipeline.stage import Folders, Log, Machine, Stage
from experiments.settings import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Asked = dict[str, Any]
"""What is known of a picture: key, prompt, split, and label and attributes where there are any."""


@dataclass(frozen=True)
class Embedded:
    """Data that the project draws or ships."""

    name: str
    resolution: int
    seed: int
    max_objects: int


class FileStamp(NamedTuple):
    """A shard, known by place, size and time: a shard that was replaced is another one."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class OwnShards:
    """Shards of the user; without validation shards some keys of the training ones are held out."""

    train: tuple[FileStamp, ...]
    val: tuple[FileStamp, ...] | None


@dataclass(frozen=True)
class Listed:
    """A corpus of pictures in files of their own, known by the lists and folders that name them."""

    name: str
    root: str
    index: tuple[FileStamp, ...]


@dataclass(frozen=True, eq=False)
class Shards(Stage):
    """The shards of one split: drawn here, or found."""

    NAME = "data-{split}"
    VERSION = 2

    source: Embedded | OwnShards | Listed
    split: str
    size: int | None = None
    """Samples, at most."""

    def run(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        """Write the tars, or list the user's, or list pictures."""
        from data.shards import count_rows
        from data.sources import find_shards, list_pictures, write_embedded

        source = self.source
        if isinstance(source, Embedded):
            assert self.size is not None
            shards = write_embedded(
                folder,
                source.name,
                self.split,
                self.size,
                source.seed,
                source.resolution,
                source.max_objects,
            )
        elif isinstance(source, Listed):
            tables = [Path(s.path).name for s in source.index if Path(s.path).is_file()]
            if tables:
                log.note(f"{source.name}: by {', '.join(tables)}")
            root = Path(source.root)
            shards = list_pictures(folder, source.name, root, self.split, self.size, log.note)
        else:
            val = None if source.val is None else [stamp.path for stamp in source.val]
            train = [stamp.path for stamp in source.train]
            shards = find_shards(
                train,
                val,
                self.split,
                self.size,
                allow_pipe=True,  # the settings allowed it
            )
        if self.split == "train":  # once, not whenever a training starts
            shards = replace(shards, rows=count_rows(shards))
        shards.save(folder / "shards.json")
        return {"shards": len(shards.paths)}

    def shards(self, inputs: Folders) -> ShardList:
        """Return what the stage found."""
        return ShardList.load(inputs[self] / "shards.json")


@dataclass(frozen=True, eq=False)
class Captions(Stage):
    """What samples of a split say; no picture is decoded for it."""

    NAME = "captions-{shards.split}"

    shards: Shards
    view: View
    count: int
    """Samples, at most."""
    first: int = 0
    """Samples that are passed over."""

    @property
    def split(self) -> str:
        """The split that they are of."""
        return self.shards.split

    def run(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        """Read them."""
        from data.select import captions
        from data.shards import SkipCounter

        shards, split = self.shards.shards(inputs), self.shards.split
        skips = SkipCounter(machine.max_skipped)
        found = captions(shards, self.view, first=self.first, limit=self.count, skips=skips)
        rows = [{"split": split, "prompt": row.pop("caption"), **row} for row in found]
        write_json(folder / "captions.json", rows)
        if not self.first:  # the others are of the same split, and said already
            log.note(skips.told(split))
        return {"samples": len(rows), **skips.found()}

    def rows(self, inputs: Folders) -> list[Asked]:
        """Return what the samples say, in order."""
        path = inputs[self] / "captions.json"
        return _read_rows(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)  # every batch of a sampling asks for them
def _read_rows(path: Path, mtime_ns: int) -> list[Asked]:
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Pictures:
    """The pictures of some captions, decoded as validation sees them."""

    captions: Captions

    @property
    def name(self) -> str:
        """What the stage of their features is called by."""
        return self.captions.split

    def rows(self, inputs: Folders) -> list[Asked]:
        """Return what is known of the pictures, in order."""
        return self.captions.rows(inputs)

    def reader(
        self, inputs: Folders, machine: Machine
    ) -> Callable[[int, int], tuple[Tensor, list[Asked]]]:
        """Return what reads pictures [first, last): uint8 [B, 3, H, W], and what is known of them.

        Each is decoded once where the calls go upwards; one that cannot be decoded is left out.
        """
        import numpy as np
        import torch

        from data.select import decoded, encoded
        from data.shards import SkipCounter, apply

        c, rows = self.captions, self.captions.rows(inputs)
        shards, skips = c.shards.shards(inputs), SkipCounter(machine.max_skipped)

        def stream(first: int) -> Iterator[Asked]:
            found = encoded(shards, c.view, skips, first=c.first + first, limit=len(rows) - first)
            return ({**sample, "index": i} for i, sample in enumerate(found, first))

        position, samples = 0, stream(0)

        def read(first: int, last: int) -> tuple[Tensor, list[Asked]]:
            nonlocal position, samples
            if first < position:
                samples = stream(first)
            else:
                next(islice(samples, first - position, first - position), None)
            position = last
            batch = islice(samples, last - first)
            good = list(apply(lambda s: {**decoded(s, c.view), "index": s["index"]}, batch, skips))
            if not good:
                raise ValueError(f"no picture of {c.shards.split} can be decoded: {skips.counts}")
            pixels = torch.from_numpy(np.stack([s["pixels"] for s in good]))  # [B, H, W, 3]
            asked = [{**rows[s["index"]], "index": s["index"]} for s in good]
            return pixels.permute(0, 3, 1, 2).contiguous(), asked

        return read


@dataclass(frozen=True)
class PictureSource:
    """Training on pictures that are decoded, and encoded, in every step."""

    shards: Shards
    view: View


@dataclass(frozen=True)
class Data:
    """The shards of a run, split by split; the size of one changes no other."""

    config: DataConfig
    prompts: int
    """Captions of val that are asked; as many references are twice."""
    heldout: int
    """The same of heldout."""
    partial: int
    """Captions in part that are asked, which have a split of their own."""

    def shards(self, split: str, resolution: int | None = None) -> Shards:
        """Return the shards of train, val, heldout, or of the references of the last two."""
        c = self.config
        sizes = {
            "train": c.train_size,
            "val": c.val_size,
            "heldout": c.heldout_size,
            "reference": 2 * self.prompts,
            "heldout_reference": 2 * self.heldout,
            "partial": self.partial,
        }
        if c.name in EMBEDDED:
            source = Embedded(c.name, resolution or c.resolution, c.seed, c.max_objects)
            return Shards(source, split, sizes[split])
        return Shards(self._source(), split, None if split == "train" else sizes[split])

    def _source(self) -> OwnShards | Listed:
        """Return the user's shards, or the corpus.

        Raises:
            ConfigError: nothing is there, or something of the corpus is missing.
        """
        c = self.config
        train: str | list[str] | None = c.shards
        val: str | list[str] | None = c.val_shards
        if train is None:
            assert c.root is not None
            corpus = corpora()[c.name]
            try:
                if corpus.kind in KINDS:
                    if val is not None:
                        raise ConfigError(
                            f"data.val_shards goes with data.shards; {c.name} says itself which "
                            "pictures are validation"
                        )
                    found = file_stamps(list(map(str, index(c.name, c.root))))
                    return Listed(c.name, os.path.abspath(c.root), found)
                train, official = shards_of(c.name, c.root)
            except (ValueError, OSError) as error:
                raise ConfigError(f"data.root: {error}") from error
            val = val or official
        shards = stamps("data.shards", train, c.allow_pipe)
        own = None if val is None else stamps("data.val_shards", val, c.allow_pipe)
        return OwnShards(shards, own)

    def view(self, resolution: int | None = None) -> View:
        """Return how training sees a sample."""
        view = self.config.view()
        return view if resolution is None else replace(view, resolution=resolution)

    def captions(self, split: str, count: int, resolution: int | None = None) -> Captions:
        """Return the first captions of a split; its pictures are seen as validation sees them."""
        return Captions(self.shards(split, resolution), self.view(resolution), count)

    def reference(self, split: str) -> Captions:
        """Return samples that are not among the first ones of val or heldout, which are asked."""
        if self.config.name not in EMBEDDED:
            asked = {"val": self.prompts, "heldout": self.heldout}[split]
            return Captions(self.shards(split), self.view(), 2 * asked, first=asked)
        name = "reference" if split == "val" else f"{split}_reference"
        shards = self.shards(name)
        assert shards.size is not None
        return Captions(shards, self.view(), shards.size)


def stamps(
    setting: str, pattern: str | list[str], allow_pipe: bool = False
) -> tuple[FileStamp, ...]:
    """Return the shards of a pattern, which a message calls by its setting.

    Raises:
        ConfigError: a pattern that matches nothing, or a remote shard that is not there.
    """
    from data.patterns import expand_shards
    from data.remote import is_remote

    try:
        found = expand_shards(pattern, allow_pipe)
        return file_stamps([p if is_remote(p) else os.path.abspath(p) for p in found])
    except (ValueError, OSError) as error:
        raise ConfigError(f"{setting}: {error}") from error


def file_stamps(paths: Sequence[str]) -> tuple[FileStamp, ...]:
    """Return what files, local or remote, are known by."""
    from data.remote import stamps_of

    found = zip(paths, stamps_of(paths), strict=True)
    return tuple(FileStamp(path, size, mark) for path, (size, mark) in found)

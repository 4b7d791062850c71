"""The DataModule: captioned images from shards, whether drawn here, handwritten or from the web.

Training is virtual epochs of the global order (`data.order`). Validation is a list, exact and in
order.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from data.images import join, stack
from data.readers import Sample, stamp
from data.select import decoded, encoded, select, visited
from data.shards import CHANGED, apply, count_rows, held_rows, lost_by, read_shard
from data.skips import OTHER_SPLIT, SEEN, SkipCounter
from data.stream import EpochData
from data.view import MAX_SKIPPED, Order, ShardList, View

# Lightning doubts what is meant: lengths are exact, lists in memory need no workers, [] is none
warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
warnings.filterwarnings("ignore", message="The '[a-z_]+' does not have many workers")
warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")


class ShardPictures:
    """The rows of image shards and what training sees of them, see `data.order.Source`.

    Rows are the samples of the split, good and bad. A draw depends on (seed, pass, key).

    Args:
        shards: the training split.
        view: how samples become pictures.
        seed: of the draws.
        max_skipped: share of bad samples at which a ValueError is raised.
    """

    def __init__(self, shards: ShardList, view: View, seed: int, max_skipped: float):
        self.shards, self.view, self.seed = shards, view, seed
        self.skips = SkipCounter(max_skipped)
        self._stamps: dict[str, tuple[int, int]] = {}  # of shards when they were first opened

    def rows(self, shard: int, first: int) -> Iterator[Sample | None]:
        """Yield encoded samples, and None where one is left out."""
        shards, url = self.shards, self.shards.paths[shard]
        if shards.rows is not None and (kind := self._vanished(url)):
            for _ in range(first, shards.rows[shard]):
                self.skips.add({SEEN: 1, kind: 1})
                yield None
            return
        raw = first
        if first and shards.holdout:
            held = held_rows(url, shards)
            raw = held[first] if first < len(held) else 2**62
        for sample in read_shard(url, self.skips, raw, shards.paths):
            if not shards.holds(sample["__key__"]):
                self.skips.add({OTHER_SPLIT: 1})
                continue
            yield self._tried(sample, lambda raw: select(raw, shards, self.view))

    def _vanished(self, url: str) -> str:
        """Say why a shard is not what it was when it was first opened; "" where it is."""
        try:
            found = stamp(url)
        except OSError as error:
            self.skips.note(lost_by(error), url, str(error))
            return lost_by(error)
        if self._stamps.setdefault(url, found) != found:
            self.skips.note(CHANGED, url, "its size or time is another one")
            return CHANGED
        return ""

    def show(self, row: Sample, visit: int) -> Sample | None:
        """Decode a sample as this pass sees it."""
        draw = f"{self.seed}/{visit}/{row['key']}"
        return self._tried(row, lambda row: visited(row, self.view, draw, self.view.flip))

    def stack(self, samples: list[Sample]) -> dict[str, Any]:
        """Put pictures together."""
        return stack(samples)

    def take(self) -> tuple[dict[str, int], dict[str, str]]:
        """Return what was counted since the last call, and examples of it."""
        return self.skips.take()

    def _tried(self, sample: Sample, function: Any) -> Sample | None:
        found = next(apply(function, [sample], self.skips), None)
        if found is not None:
            self.skips.in_a_row = 0
        return found


class ExactBatches(IterableDataset):
    """A list of samples in `count` batches of nearly equal size, in order.

    Lightning would give a dataset with indices a sampler that repeats samples until all ranks have
    equally many.
    """

    def __init__(self, samples: list[Sample], count: int):
        places = np.array_split(np.arange(len(samples)), count)
        self.batches = [[samples[i] for i in part] for part in places]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (join([stack(batch)]) for batch in self.batches)


class WebData(EpochData):
    """Batches {"image" [B, 3, H, W] in [-1, 1], "caption" list, "key" list, "label" [B] if given}.

    Args:
        train: the training split.
        val: the validation split.
        view: how samples become pictures; those of validation are cut in the centre, not mirrored.
        order: what orders the training samples.
        batch_size: samples in a batch of one rank.
        seed: seed of the training; orders, crops and mirrors.
        epoch_batches: batches of a virtual epoch in one rank.
        val_batches: validation batches of one rank, at most.
        max_skipped: share of bad samples at which a ValueError is raised.

    Raises:
        ValueError: a training split with a limit, which an endless stream cannot keep.
    """

    def __init__(
        self,
        train: ShardList,
        val: ShardList | None,
        view: View,
        order: Order,
        *,
        batch_size: int,
        seed: int = 0,
        epoch_batches: int = 100,
        val_batches: int = 0,
        max_skipped: float = MAX_SKIPPED,
    ):
        super().__init__(
            batch_size=batch_size,
            seed=seed,
            epoch_batches=epoch_batches,
            shuffle_buffer=order.shuffle_buffer,
            workers=order.workers,
            skips=SkipCounter(max_skipped),
        )
        if train.limit is not None:
            raise ValueError(f"a training split has no limit, got limit={train.limit}")
        self.train, self.val, self.view = train, val, view
        self.val_batches, self.max_skipped = val_batches, max_skipped
        self._loaded: dict[tuple[int, int], ExactBatches] = {}

    @property
    def skipped(self) -> dict[str, int]:
        """What was counted in all ranks: "seen", and samples left out by kind of fault."""
        return dict(self.left_out.counts)

    def shard_rows(self) -> tuple[int, ...]:
        """Return how many samples of the split every shard has, good and bad."""
        if self.train.rows is None:
            self.train = replace(self.train, rows=count_rows(self.train))
        assert self.train.rows is not None
        return self.train.rows

    def source(self) -> ShardPictures:
        """Return what reads the shards."""
        return ShardPictures(self.train, self.view, self.seed, self.max_skipped)

    def join(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of some parts."""
        return join(parts)

    def val_dataloader(self) -> Any:
        """Return the loader of this rank's part of the validation samples, [] without any."""
        trainer = self.trainer
        if self.val is None or not self.val_batches:
            return []
        return self.val_stream(*(trainer.global_rank, trainer.world_size) if trainer else (0, 1))

    def val_stream(self, rank: int = 0, world: int = 1) -> DataLoader:
        """Return the loader of a rank's part of the validation samples, in order, none twice.

        All ranks have equally many batches, so that none waits for another; where the samples do
        not fill them, the last differ in size. A rank decodes its own samples once, and keeps them
        as bytes.

        Raises:
            ValueError: no validation split, fewer samples than ranks, or too many bad ones.
        """
        if self.val is None:
            raise ValueError("no validation split was given")
        if (rank, world) not in self._loaded:
            self._loaded[rank, world] = self._load(self.val, rank, world)
        return DataLoader(self._loaded[rank, world], batch_size=None, num_workers=0)

    def _load(self, val: ShardList, rank: int, world: int) -> "ExactBatches":
        skips = SkipCounter(self.max_skipped)
        samples: list[Sample] = []
        total = 0
        limit = world * self.batch_size * self.val_batches
        for sample in encoded(val, self.view, skips, limit=limit):
            if total % world == rank:
                samples += apply(lambda s: decoded(s, self.view), [sample], skips)
            total += 1
        skips.check()
        count = min(-(-total // (world * self.batch_size)), total // world)
        if not 0 < count <= len(samples):
            raise ValueError(
                f"{total} validation samples, of which rank {rank} can use {len(samples)}, cannot "
                f"be shared by {world} ranks: give more, or use fewer devices"
            )
        return ExactBatches(samples, count)

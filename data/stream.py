"""Virtual epochs of global batches: the part of a rank, read by its workers and joined again.

A training is an endless stream of batches, cut into epochs of `epoch_batches`. Workers go on from
epoch to epoch. At every border a cursor per slot says where the next epoch begins; the cursors
stand in the checkpoint, so a run that resumes there sees what the uninterrupted one sees, also
with another number of ranks of the same global batch. Without a cursor an epoch is found by
reading what comes before it.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.order import Cursor, GlobalOrder, Slot, Source
from data.skips import SkipCounter

T = TypeVar("T")
Cursors = dict[int, Cursor]
Skipped = tuple[dict[str, int], dict[str, str]]


class Slice(NamedTuple):
    """A worker's part of a batch."""

    part: Any
    """What `Source.stack` made of the samples."""
    skipped: Skipped
    """What was counted since the slice before, and examples of it."""
    cursors: Cursors
    """Where the slots stand after the last batch of an epoch; empty elsewhere."""
    refusal: str = ""
    """Why the worker gives up; the other fields are empty then."""


class SliceStream(IterableDataset):
    """The slices of every worker of a rank, from an epoch on, without end.

    Args:
        source: reads and shows the rows.
        order: the global order.
        slots: those of the rank; the workers share them.
        epoch: number of the first epoch.
        epoch_batches: batches of an epoch.
        known: cursors of slots at the border of an epoch that is not later: epoch -> cursors.
    """

    def __init__(
        self,
        source: Source,
        order: GlobalOrder,
        slots: range,
        epoch: int,
        epoch_batches: int,
        known: dict[int, Cursors],
    ):
        self.source, self.order, self.slots = source, order, slots
        self.epoch, self.epoch_batches, self.known = epoch, epoch_batches, known

    def __iter__(self) -> Iterator[Slice]:
        try:
            yield from self._slices()
        except ValueError as error:  # a sentence for who waits, not this worker's traceback
            yield Slice(None, ({}, {}), {}, str(error))

    def _slices(self) -> Iterator[Slice]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        own = np.array_split(np.array(self.slots), workers)[worker].tolist()
        streams = {slot: self._opened(slot) for slot in own}
        for batch in itertools.count(1):
            drawn = {slot: next(stream) for slot, stream in streams.items()}
            part = self.source.stack([sample for sample, _ in drawn.values()])
            border = batch % self.epoch_batches == 0
            cursors = {slot: cursor for slot, (_, cursor) in drawn.items()} if border else {}
            yield Slice(part, self.source.take(), cursors)

    def _opened(self, slot: int) -> Iterator[tuple[Any, Cursor]]:
        """Return what a slot yields from the first epoch on."""
        borders = {epoch: c[slot] for epoch, c in self.known.items() if slot in c}
        nearest = max((epoch for epoch in borders if epoch <= self.epoch), default=0)
        cursor = borders.get(nearest, Cursor())
        stream = iter(Slot(self.order, self.source, slot, cursor))
        return itertools.islice(stream, (self.epoch - nearest) * self.epoch_batches, None)


def unchanged(item: Any) -> Any:
    """Return a slice as it is."""
    return item


class EpochData(LightningDataModule):
    """Training in virtual epochs; rank r of W has places [r B, (r + 1) B) of every global batch.

    The trainer must be made with `reload_dataloaders_every_n_epochs=1`.

    Args:
        batch_size: samples in a batch of one rank, B.
        seed: seed of the training; orders, crops, mirrors and captions.
        epoch_batches: batches of a virtual epoch in one rank.
        shuffle_buffer: rows of all slots together that are held to be shuffled.
        workers: processes that read and decode; 0 does so in the training process.
        skips: counts what is left out.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        seed: int,
        epoch_batches: int,
        shuffle_buffer: int,
        workers: int,
        skips: SkipCounter,
    ):
        super().__init__()
        self.batch_size, self.seed, self.epoch_batches = batch_size, seed, epoch_batches
        self.shuffle_buffer, self.workers, self.skips = shuffle_buffer, workers, skips
        self._borders: dict[str, dict[int, Cursors]] = {}  # order -> epoch -> cursors
        self._running: tuple[Any, Iterator[Slice]] | None = None
        self.everywhere = SkipCounter(1.0)  # of all ranks, at the last checkpoint
        self._before: Skipped = ({}, {})  # the same, at the one that was resumed from

    def shard_rows(self) -> tuple[int, ...]:
        """Return how many rows every shard has, good and bad."""
        raise NotImplementedError

    def source(self) -> Source:
        """Return what reads the rows, for one process."""
        raise NotImplementedError

    def join(self, parts: list[Any]) -> dict[str, Any]:
        """Return the batch whose parts `Source.stack` made, in order."""
        raise NotImplementedError

    def order(self, world: int = 1) -> GlobalOrder:
        """Return the order of the global batches of so many ranks."""
        slots = self.batch_size * world
        return GlobalOrder(
            self.shard_rows(), slots, self.seed, max(1, self.shuffle_buffer // slots)
        )

    def stream(self, epoch: int = 0, rank: int = 0, world: int = 1) -> "EpochLoader":
        """Return the loader of a virtual epoch: a function of (seed, epoch, rank, world)."""
        return EpochLoader(self, epoch, rank, world)

    def train_dataloader(self) -> "EpochLoader":
        """Return the loader of the trainer's current epoch."""
        trainer = self.trainer
        if trainer is None:
            return self.stream()
        return self.stream(trainer.current_epoch, trainer.global_rank, trainer.world_size)

    def teardown(self, stage: str) -> None:
        """End the workers."""
        self._running = None

    def slices(self, order: GlobalOrder, epoch: int, rank: int, world: int) -> Iterator[Slice]:
        """Return the slices of a rank from an epoch on: those that run, where they stand there."""
        running, self._running = self._running, None
        if running is not None and running[0] == (order.name, epoch, rank, world):
            return running[1]
        slots = range(rank * self.batch_size, (rank + 1) * self.batch_size)
        known = self._borders.get(order.name, {})
        data = SliceStream(self.source(), order, slots, epoch, self.epoch_batches, known)
        if not self.workers:
            return iter(data)
        loader = DataLoader(
            data,
            batch_size=None,
            num_workers=self.parts,
            collate_fn=unchanged,
            prefetch_factor=2 * self.parts,  # a slice is a part of a batch
            generator=torch.Generator().manual_seed(self.seed),  # leaves the global one alone
        )
        return iter(loader)

    @property
    def left_out(self) -> SkipCounter:
        """What was counted in all ranks until the last checkpoint; without one, in this rank."""
        return self.everywhere if self.everywhere.counts else self.skips

    @property
    def parts(self) -> int:
        """Number of slices in a batch: one of each worker; no worker is without a slot."""
        return min(max(1, self.workers), self.batch_size)

    def reach(
        self, order: GlobalOrder, epoch: int, where: Any, cursors: Cursors, it: Iterator[Slice]
    ) -> None:
        """Keep where an epoch begins, and what goes on there."""
        known = self._borders.setdefault(order.name, {})
        known.setdefault(epoch, {}).update(cursors)
        for old in [e for e in known if e < epoch - 1]:
            del known[old]
        self._running = ((order.name, epoch, *where), it)

    def state_dict(self) -> dict[str, Any]:
        """Return where all ranks stand at the last border that was reached, and what they counted.

        All ranks must call it.
        """
        if not self._borders:
            return {}
        name, known = next(reversed(self._borders.items()))
        epoch = max(known)
        cursors = {slot: list(cursor) for slot, cursor in known[epoch].items()}
        ranks = gathered((cursors, dict(self.skips.counts), self.skips.examples))
        self.everywhere = SkipCounter(1.0)
        self.everywhere.merge(*self._before)
        for _, counts, examples in ranks:
            self.everywhere.merge(counts, examples)
        return {
            "order": name,
            "epoch": epoch,
            "cursors": {slot: cursor for part, _, _ in ranks for slot, cursor in part.items()},
            "skipped": (dict(self.everywhere.counts), self.everywhere.examples),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what a checkpoint says."""
        cursors = {slot: Cursor(*cursor) for slot, cursor in state_dict["cursors"].items()}
        self._borders = {state_dict["order"]: {state_dict["epoch"]: cursors}}
        self._before = state_dict["skipped"]
        self.everywhere.merge(*self._before)


def gathered(item: T) -> list[T]:
    """Return what every rank gives, in their order; all of them must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [item]
    items: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(items, item)
    return items


class EpochLoader:
    """The batches of one rank in one virtual epoch, `epoch_batches` in every rank."""

    def __init__(self, data: EpochData, epoch: int, rank: int, world: int):
        self.data, self.epoch, self.rank, self.world = data, epoch, rank, world

    def __len__(self) -> int:
        return self.data.epoch_batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        data, where = self.data, (self.rank, self.world)
        order = data.order(self.world)
        slices = data.slices(order, self.epoch, *where)
        for number in range(1, len(self) + 1):
            found = list(itertools.islice(slices, data.parts))
            refused = next((one.refusal for one in found if one.refusal), None)
            if refused:
                raise ValueError(refused)
            for one in found:
                data.skips.merge(*one.skipped)
            if number == len(self):
                cursors = {slot: cursor for one in found for slot, cursor in one.cursors.items()}
                data.reach(order, self.epoch + 1, where, cursors, slices)
            yield data.join([one.part for one in found])

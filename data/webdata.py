"""The DataModule: captioned images from shards, whether drawn here, handwritten or from the web.

Training is virtual epochs of `epoch_batches` batches over an endless stream that is seeded by
(seed, epoch, rank, worker), so a run that resumes at the border of an epoch sees what the
uninterrupted one sees. Validation is a list, exact and in order.
"""

import random
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import shuffle

from data.images import collate
from data.select import decoded, encoded, selected
from data.shards import Sample, ShardStream, SkipCounter, apply
from data.view import MAX_SKIPPED, Order, ShardList, View

# Lightning doubts what is meant: lengths are exact, lists in memory need no workers, [] is none
warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
warnings.filterwarnings("ignore", message="The '[a-z_]+' does not have many workers")
warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")


class TrainStream(IterableDataset):
    """What one rank trains on in one virtual epoch: `epoch_batches` batches in every rank.

    Every worker follows its own `ShardStream` and ends after its share of the batches, so that
    no epoch ends in the middle of one. A sample carries under "skipped" what its worker counted
    since the one before.
    """

    def __init__(self, data: "WebData", epoch: int, rank: int, world: int):
        self.urls = ShardStream(data.train.paths, data.seed, epoch, rank, world)
        self.shards, self.view, self.buffer = data.train, data.view, data.order.shuffle_buffer
        self.batch_size, self.epoch_batches = data.batch_size, data.epoch_batches
        self.max_skipped = data.max_skipped

    def __len__(self) -> int:
        return self.batch_size * self.epoch_batches

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        size = len(range(worker, self.epoch_batches, workers)) * self.batch_size
        name = f"{self.urls.seed}/{self.urls.epoch}/{self.urls.rank}/{worker}"
        rng = random.Random(name)
        skips = SkipCounter(self.max_skipped)
        samples = selected(self.urls, self.shards, self.view, skips)
        mixed = shuffle(self.buffer, initial=self.buffer, seed=name)(samples)
        flip = self.view.flip
        shown = apply(lambda s: decoded(s, self.view, rng, flip), mixed, skips)
        for sample in islice(shown, size):
            yield {**sample, "skipped": skips.take()}


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
        return map(collate, self.batches)


class EpochData(LightningDataModule):
    """Training in virtual epochs, each a stream that is seeded when its loader is made.

    The trainer must be made with `reload_dataloaders_every_n_epochs=1`.
    """

    def stream(self, epoch: int = 0, rank: int = 0, world: int = 1) -> DataLoader:
        """Return the loader of a virtual epoch."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the trainer's current epoch."""
        trainer = self.trainer
        if trainer is None:
            return self.stream()
        return self.stream(trainer.current_epoch, trainer.global_rank, trainer.world_size)


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
        super().__init__()
        if train.limit is not None:
            raise ValueError(f"a training split has no limit, got limit={train.limit}")
        self.train, self.val, self.view, self.order = train, val, view, order
        self.batch_size, self.seed = batch_size, seed
        self.epoch_batches, self.val_batches = epoch_batches, val_batches
        self.max_skipped = max_skipped
        self.skips = SkipCounter(max_skipped)
        self._loaded: dict[tuple[int, int], ExactBatches] = {}

    @property
    def skipped(self) -> dict[str, int]:
        """What was counted in all workers of this rank: "seen", and samples left out by reason."""
        return dict(self.skips.counts)

    def stream(self, epoch: int = 0, rank: int = 0, world: int = 1) -> DataLoader:
        """Return the loader of a virtual epoch: a function of (seed, epoch, rank) and workers."""
        return DataLoader(
            TrainStream(self, epoch, rank, world),
            batch_size=self.batch_size,
            drop_last=True,
            collate_fn=collate,
            num_workers=self.order.workers,
            generator=torch.Generator().manual_seed(self.seed),  # leaves the global one alone
        )

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

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Take the counts of the workers out of a training batch and add them up."""
        if isinstance(batch, dict) and "skipped" in batch:
            self.skips.add(batch.pop("skipped"))
        return batch

"""The DataModule: captioned images from shards, whether drawn here, handwritten or from the web.

Training is virtual epochs of `epoch_batches` batches over an endless stream that is seeded by
(seed, epoch, rank, worker), so a run that resumes at the border of an epoch sees what the
uninterrupted one sees. Validation is a list, exact and in order.
"""

import json
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import shuffle

from data.config import DataConfig
from data.digits import digits
from data.images import collate, to_tensor
from data.scenes import scenes
from data.select import finish, holdout_share, selected
from data.shards import Sample, ShardStream, SkipCounter, apply, expand_shards, write_shards

# Lightning doubts what is meant here: lengths are exact, and lists in memory need no workers
warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
warnings.filterwarnings("ignore", message="The '[a-z_]+' does not have many workers")

PER_SHARD = 250  # small, so that a few workers and ranks never lack a shard


def prepare(
    config: DataConfig, folder: Path, progress: Callable[[str], None] | None = None
) -> dict[str, list[str]]:
    """Write the shards of scenes or digits, or find those of the user.

    Args:
        config: what to prepare.
        folder: receives train/, val/ and heldout/; a split that stands there is kept.
        progress: is told in words what happens.

    Returns:
        Split -> paths of its shards. User shards without `val_shards` are listed under both train
        and val; `holdout_share` says which samples are whose.

    Raises:
        ValueError: a shard pattern that matches nothing.
    """
    if config.name == "shards":
        train = expand_shards(config.shards or "")
        return {"train": train, "val": expand_shards(config.val_shards or train)}
    sizes = {"train": config.train_size, "val": config.val_size}
    if config.name == "scenes":
        sizes["heldout"] = config.heldout_size
    made_by = {
        name: getattr(config, name) for name in ("name", "resolution", "seed", "max_objects")
    }
    splits: dict[str, list[str]] = {}
    for split, size in sizes.items():
        place, wanted = folder / split, {**made_by, "size": size}
        if _stands(place, wanted):
            splits[split] = sorted(str(path) for path in place.glob("*.tar"))
            continue
        if progress:
            progress(f"writing {config.name}/{split}")
        place.mkdir(parents=True, exist_ok=True)
        for stale in [place / "done.json", *place.glob("*.tar")]:
            stale.unlink(missing_ok=True)
        splits[split] = write_shards(_embedded(config, split, size), place, PER_SHARD)
        temporary = place / f".done.{os.getpid()}.tmp"
        temporary.write_text(json.dumps({"made_by": wanted, "shards": len(splits[split])}))
        os.replace(temporary, place / "done.json")
    return splits


def _stands(place: Path, wanted: dict[str, Any]) -> bool:
    """Say whether a split was written to its end with these settings."""
    with suppress(OSError, ValueError):
        done = json.loads((place / "done.json").read_text())
        return bool(done == {"made_by": wanted, "shards": len(list(place.glob("*.tar")))})
    return False


def _embedded(config: DataConfig, split: str, size: int) -> Iterator[Sample]:
    if config.name == "digits":
        return islice(digits(split, resolution=config.resolution, seed=config.seed), size)
    return scenes(
        split,
        size,
        seed=config.seed,
        resolution=config.resolution,
        max_objects=config.max_objects,
    )


class TrainStream(IterableDataset):
    """What one rank trains on in one virtual epoch: `epoch_batches` batches in every rank.

    Every worker follows its own `ShardStream` and ends after its share of the batches, so that
    no epoch ends in the middle of one. A sample carries under "skipped" what its worker counted
    since the one before.
    """

    def __init__(
        self,
        config: DataConfig,
        shards: ShardStream,
        *,
        holdout: float,
        batch_size: int,
        epoch_batches: int,
    ):
        self.config = config
        self.shards = shards
        self.holdout = holdout
        self.batch_size = batch_size
        self.epoch_batches = epoch_batches

    def __len__(self) -> int:
        return self.batch_size * self.epoch_batches

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        size = len(range(worker, self.epoch_batches, workers)) * self.batch_size
        shards = self.shards
        name = f"{shards.seed}/{shards.epoch}/{shards.rank}/{worker}"
        rng = random.Random(name)
        skips = SkipCounter(self.config.max_skipped)
        encoded = selected(shards, self.config, skips, "train", self.holdout)
        buffer = self.config.shuffle_buffer
        mixed = shuffle(buffer, initial=buffer, seed=name)(encoded)
        decoded = apply(lambda s: finish(s, self.config, rng), mixed, skips)
        for sample in islice(decoded, size):
            yield {**sample, "skipped": skips.take()}


class ExactBatches(IterableDataset):
    """A rank's part of a list, in order, without repeats, in equally many batches on all ranks.

    A sampler of torch would repeat samples until the ranks have equally many; unequal numbers of
    batches would let ranks wait for each other. Here the last batches differ in size instead.
    """

    def __init__(self, samples: list[Sample], batch_size: int, rank: int, world: int):
        if len(samples) < world:
            raise ValueError(f"{len(samples)} validation samples cannot be shared by {world} ranks")
        count = -(-len(samples) // (world * batch_size))
        count = min(count, len(samples) // world)
        mine = np.arange(rank, len(samples), world)
        self.batches = [[samples[i] for i in part] for part in np.array_split(mine, count)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(collate, self.batches)


class WebData(LightningDataModule):
    """Batches {"image" [B, 3, H, W] in [-1, 1], "caption" list, "key" list, "label" [B] if given}.

    The trainer must be made with `reload_dataloaders_every_n_epochs=1`: an epoch's stream is
    seeded when its loader is made.

    Args:
        config: the settings of the data.
        splits: what `prepare` returned.
        batch_size: samples in a batch of one rank.
        seed: seed of the training; orders, crops and mirrors.
        epoch_batches: batches of a virtual epoch in one rank.
    """

    def __init__(
        self,
        config: DataConfig,
        splits: dict[str, list[str]],
        *,
        batch_size: int,
        seed: int = 0,
        epoch_batches: int = 100,
    ):
        super().__init__()
        self.config = config
        self.splits = splits
        self.batch_size = batch_size
        self.seed = seed
        self.epoch_batches = epoch_batches
        self.holdout = holdout_share(config, splits)
        self.skips = SkipCounter(config.max_skipped)
        self._loaded: dict[tuple[str, int | None], list[Sample]] = {}

    @property
    def skipped(self) -> dict[str, int]:
        """What was counted in all workers of this rank: "seen", and samples left out by reason."""
        return dict(self.skips.counts)

    def stream(self, epoch: int = 0, rank: int = 0, world: int = 1) -> DataLoader:
        """Return the loader of a virtual epoch: a function of (seed, epoch, rank) and workers."""
        shards = ShardStream(self.splits["train"], self.seed, epoch, rank, world)
        dataset = TrainStream(
            self.config,
            shards,
            holdout=self.holdout,
            batch_size=self.batch_size,
            epoch_batches=self.epoch_batches,
        )
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            drop_last=True,
            collate_fn=collate,
            num_workers=self.config.workers,
            generator=torch.Generator().manual_seed(self.seed),  # leaves the global one alone
        )

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the trainer's current epoch."""
        trainer = self.trainer
        if trainer is None:
            return self.stream()
        return self.stream(trainer.current_epoch, trainer.global_rank, trainer.world_size)

    def val_dataloader(self) -> DataLoader:
        """Return the loader of this rank's part of the validation samples."""
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        batches = ExactBatches(self._load("val"), self.batch_size, rank, world)
        return DataLoader(batches, batch_size=None, num_workers=0)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Take the counts of the workers out of a training batch and add them up."""
        if isinstance(batch, dict) and "skipped" in batch:
            self.skips.add(batch.pop("skipped"))
        return batch

    def samples(self, split: str, limit: int | None = None) -> list[Sample]:
        """Return the samples of a split, exact and in order.

        Args:
            split: train, val or heldout.
            limit: at most so many; validation and held-out sets are limited by their own size.

        Returns:
            [{"image" [3, H, W] in [-1, 1], "caption", "key"}], with "label" (int) and
            "attributes" (dict) where KEY.json has them.

        Raises:
            ValueError: an unknown or an empty split, or too many bad samples.
        """
        return [
            {"image": to_tensor(s["pixels"]), **{k: v for k, v in s.items() if k != "pixels"}}
            for s in self._load(split, limit)
        ]

    def _load(self, split: str, limit: int | None = None) -> list[Sample]:
        """Decode a split (`limit` samples of it) once, and keep it as bytes of pixels."""
        if split not in self.splits:
            raise ValueError(f"{self.config.name} has {', '.join(self.splits)}, not {split!r}")
        most = {"val": self.config.val_size, "heldout": self.config.heldout_size}.get(split)
        limit = most if limit is None else limit if most is None else min(limit, most)
        if (split, limit) not in self._loaded:
            skips = SkipCounter(self.config.max_skipped)
            encoded = selected(self.splits[split], self.config, skips, split, self.holdout)
            samples = list(islice(apply(lambda s: finish(s, self.config), encoded, skips), limit))
            skips.check()
            if not samples:
                raise ValueError(
                    f"the {split} split of {self.config.name} has no sample; "
                    "give more shards, or val_shards"
                )
            self._loaded[split, limit] = samples
        return self._loaded[split, limit]

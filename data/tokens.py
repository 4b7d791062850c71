"""Shards encoded once, to tokens or to moments of latents, and the DataModule that reads them.

For every training shard 00000.tokens.safetensors holds `tokens` [N, h, w] (and `tokens_flip`, the
tokens of the mirrored images) and 00000.tokens.parquet key, caption and label of the same rows.
Continuous autoencoders have `moments` [N, 2C, h, w] in place of tokens: the mean and the logarithm
of the variance of the posterior, of which a latent is drawn anew at every read. cache.json says
what made them and is written last.
"""

import json
import os
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from lightning import LightningDataModule
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from data.config import DataConfig
from data.images import to_tensor
from data.select import finish, holdout_share, selected
from data.shards import Sample, SkipCounter, apply

# Lightning doubts what is meant here: lengths are exact, and lists in memory need no workers
warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
warnings.filterwarnings("ignore", message="The '[a-z_]+' does not have many workers")

SETTINGS = (
    "resolution",
    "crop",
    "flip",
    "min_size",
    "min_aesthetic",
    "max_pwatermark",
    "max_punsafe",
)
WIDE = {"tokens": np.int64, "moments": np.float32}  # in a batch
SCHEMA = pyarrow.schema(
    [("key", pyarrow.string()), ("caption", pyarrow.string()), ("label", pyarrow.int64())]
)


def content(num_codes: int | None) -> str:
    """Return what a cache holds under this name: tokens of a codebook, or moments without one."""
    return "moments" if num_codes is None else "tokens"


def cache_settings(config: DataConfig, sha256: str, num_codes: int | None) -> dict[str, Any]:
    """Return what a cache must have been made with to stand for this configuration.

    Args:
        config: the settings of the data.
        sha256: of the tokenizer's file.
        num_codes: size of its codebook; None where it has none and gives moments.
    """
    made_with = {name: getattr(config, name) for name in SETTINGS}
    return {"tokenizer": sha256, "num_codes": num_codes, **made_with}


def write_token_cache(
    encode: Callable[[Tensor], Tensor],
    config: DataConfig,
    splits: dict[str, list[str]],
    folder: Path,
    *,
    sha256: str,
    num_codes: int | None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Encode every training shard once, in order; a shard that is done is not done again.

    Augmentation freezes: with crop "random" an image keeps one crop, drawn from its key; with
    `flip` the mirrored image is encoded too.

    Args:
        encode: images [B, 3, H, W] in [-1, 1] on `device` -> tokens [B, h, w] int64, or moments
            [B, 2C, h, w] float.
        config: the settings of the data.
        splits: what `data.webdata.prepare` returned.
        folder: where to write.
        sha256: of the tokenizer's file.
        num_codes: size of its codebook, above 65,536 of which tokens take 4 bytes; None where
            `encode` gives moments, which are kept in half precision.
        batch_size: images encoded at once.
        device: where `encode` works.
        progress: is told in words what happens.

    Returns:
        What cache.json holds: `cache_settings`, "shards", "count", and "skipped", what became of
        the samples that were read (see `SkipCounter`).

    Raises:
        ValueError: too many bad samples, a token outside the codebook, a moment that half
            precision cannot hold, or no sample at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = cache_settings(config, sha256, num_codes)
    holdout = holdout_share(config, splits)
    skips = SkipCounter(config.max_skipped)
    urls, count, skipped = splits["train"], 0, Counter[str]()
    for index, url in enumerate(urls):
        path = folder / f"{index:05d}.{content(num_codes)}.safetensors"
        source = {"shard": os.path.abspath(url), "bytes": os.path.getsize(url), "holdout": holdout}
        stamp = json.dumps({**settings, **source})
        done = _rows_of(path, stamp)
        if done is None:
            encoded = selected([url], config, skips, "train", holdout)
            samples = apply(lambda s: _pixels(s, config), encoded, skips)
            done = _write_shard(
                path, samples, encode, stamp, config.flip, num_codes, batch_size, device, skips
            )
            if progress:
                progress(f"shard {index + 1} of {len(urls)}: {done[0]} images encoded")
        count += done[0]
        skipped.update(done[1])
    skips.check()
    if not count:
        raise ValueError("the training shards hold no sample to encode")
    summary = {**settings, "shards": len(urls), "count": count, "skipped": dict(skipped)}
    _atomically(folder / "cache.json", lambda p: p.write_text(json.dumps(summary, indent=1)))
    return summary


def count_tokens(folder: Path, num_codes: int, sha256: str | None = None) -> Tensor:
    """Count how often every code occurs in a cache of tokens, those of mirrored images included.

    Args:
        folder: what `write_token_cache` wrote.
        num_codes: size of the tokenizer's codebook.
        sha256: of the tokenizer's file; None takes any.

    Returns:
        [num_codes] int64.

    Raises:
        ValueError: no cache, or one of another tokenizer.
    """
    if not (folder / "cache.json").is_file():
        raise ValueError(f"{folder} is no finished cache of tokens: there is no cache.json")
    made = json.loads((folder / "cache.json").read_text())
    if made["num_codes"] != num_codes or sha256 not in (None, made["tokenizer"]):
        raise ValueError(f"{folder} was made with another tokenizer, of {made['num_codes']} codes")
    counts = torch.zeros(num_codes, dtype=torch.int64)
    for index in range(made["shards"]):
        with safe_open(folder / f"{index:05d}.tokens.safetensors", "np") as f:
            for name in f.keys():
                tokens = torch.from_numpy(f.get_tensor(name).astype(np.int64))
                counts += torch.bincount(tokens.flatten(), minlength=num_codes)
    return counts


def _pixels(sample: Sample, config: DataConfig) -> Sample:
    """Decode with the crop that belongs to the key, never mirrored."""
    rng = random.Random(f"{config.seed}/{sample['key']}")
    return finish(sample, replace(config, flip=False), rng)


def _write_shard(
    path: Path,
    samples: Iterator[Sample],
    encode: Callable[[Tensor], Tensor],
    stamp: str,
    flip: bool,
    num_codes: int | None,
    batch_size: int,
    device: str | torch.device,
    skips: SkipCounter,
) -> tuple[int, dict[str, int]]:
    """Encode one shard; its tokens appear after its captions, and stand for the whole.

    Returns:
        Its rows, and what `skips` counted meanwhile.
    """
    name = content(num_codes)
    grids: dict[str, list[np.ndarray]] = {name: [], f"{name}_flip": []}
    rows: list[dict[str, Any]] = []

    def flush(batch: list[Sample]) -> None:
        images = to_tensor(np.stack([s["pixels"] for s in batch])).to(device)
        for key, view in {name: images, f"{name}_flip": images.flip(-1)}.items():
            if key == name or flip:
                with torch.no_grad():
                    encoded = encode(view).cpu().numpy()
                grids[key].append(_packed(encoded, num_codes, path))
        rows.extend({column: s.get(column) for column in SCHEMA.names} for s in batch)

    batch: list[Sample] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == batch_size:
            flush(batch)
            batch = []
    if batch:
        flush(batch)
    table = pyarrow.Table.from_pylist(rows, SCHEMA)
    _atomically(
        path.with_suffix(".parquet"),
        lambda p: pyarrow.parquet.write_table(table, p, compression="zstd"),
    )
    tensors = {
        # what comes from a channels-last tensor is not laid out as a file holds it
        key: np.ascontiguousarray(np.concatenate(parts))
        for key, parts in grids.items()
        if parts
    }
    skipped = skips.take()
    metadata = {"made_with": stamp, "rows": str(len(rows)), "skipped": json.dumps(skipped)}
    _atomically(path, lambda p: save_file(tensors, p, metadata))
    return len(rows), skipped


def _packed(encoded: np.ndarray, num_codes: int | None, path: Path) -> np.ndarray:
    """Return tokens in 2 or 4 bytes, moments in half precision.

    Raises:
        ValueError: a token outside the codebook, or a moment that is no number of that precision.
    """
    if num_codes is None:
        with np.errstate(over="ignore"):
            moments = encoded.astype(np.float16)  # [B, 2C, h, w]
        if not np.isfinite(moments).all():
            raise ValueError(f"a moment of {path} is no finite number of half precision")
        return moments
    if encoded.min() < 0 or encoded.max() >= num_codes:
        raise ValueError(f"a token of {path} is outside the {num_codes} codes")
    return encoded.astype(np.uint16 if num_codes <= 2**16 else np.int32)  # [B, h, w]


def _rows_of(path: Path, stamp: str) -> tuple[int, dict[str, int]] | None:
    """Return rows and counts of a finished shard; None where it must be made (again)."""
    with suppress(OSError, SafetensorError), safe_open(path, "numpy") as stored:
        metadata = stored.metadata() or {}
        if metadata.get("made_with") == stamp and path.with_suffix(".parquet").exists():
            return int(metadata["rows"]), json.loads(metadata["skipped"])
    return None


def _atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let a file appear complete or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(temporary)
    os.replace(temporary, path)


class StoredRows:
    """Rows of one tensor that lies in several safetensors files, read when they are asked for.

    The files are mapped, so that a set larger than the memory can be trained on; what fits is kept
    by the operating system.

    Args:
        paths: the files.
        name: of the tensor; a file without rows may lack it.
    """

    def __init__(self, paths: Sequence[Path], name: str):
        files = [safe_open(path, "numpy") for path in paths]
        self.parts = [file.get_slice(name) for file in files if name in file.keys()]
        lengths = [part.get_shape()[0] for part in self.parts]
        self.starts = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows of these numbers [B] as [B, ...]."""
        which = np.searchsorted(self.starts, rows, side="right") - 1
        places = zip(which, (rows - self.starts[which]).tolist(), strict=True)
        return np.concatenate([self.parts[part][row : row + 1] for part, row in places])


class TokenStream(IterableDataset):
    """What one rank trains on in one virtual epoch: batch b is a function of (seed, epoch, rank).

    The epochs follow each other through an endless list of permutations, of which pass p is drawn
    from (seed, p); a batch of all ranks together is a contiguous piece of it.
    """

    def __init__(self, data: "TokenData", epoch: int, rank: int, world: int):
        self.data, self.epoch, self.rank, self.world = data, epoch, rank, world

    def __len__(self) -> int:
        return self.data.epoch_batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        size = self.data.batch_size
        for number in range(len(self)):
            first = (self.epoch * len(self) + number) * size * self.world + self.rank
            yield self.data.batch(first + self.world * np.arange(size))


class TokenData(LightningDataModule):
    """Batches {"tokens" [B, h, w] int64, "caption" list, "key" list, "label" [B] if given}.

    A cache of moments gives "moments" [B, 2C, h, w] float32 in place of tokens. The trainer must be
    made with `reload_dataloaders_every_n_epochs=1`. Rows are small and mapped from their files, so
    no worker processes are needed.

    Args:
        folder: what `write_token_cache` wrote.
        batch_size: samples in a batch of one rank.
        seed: seed of the training; order and mirrors.
        epoch_batches: batches of a virtual epoch in one rank.
        expect: `cache_settings` that the cache must have been made with.

    Raises:
        ValueError: no finished cache in the folder, or one that was made with other settings.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        batch_size: int,
        seed: int = 0,
        epoch_batches: int = 100,
        expect: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.batch_size, self.seed, self.epoch_batches = batch_size, seed, epoch_batches
        folder = Path(folder)
        try:
            made_with = json.loads((folder / "cache.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no finished token cache: no cache.json") from error
        for name, value in (expect or {}).items():
            if made_with.get(name) != value:
                raise ValueError(
                    f"the token cache {folder} was made with {name}={made_with.get(name)!r}, "
                    f"not {value!r}: encode again in another folder, or use data.cache=false"
                )
        self.content = content(made_with["num_codes"])
        paths = [folder / f"{i:05d}.{self.content}.safetensors" for i in range(made_with["shards"])]
        self.stored = StoredRows(paths, self.content)
        self.mirrored = StoredRows(paths, f"{self.content}_flip") if made_with["flip"] else None
        tables = [pyarrow.parquet.read_table(path.with_suffix(".parquet")) for path in paths]
        self.rows = pyarrow.concat_tables(tables)
        if not len(self.rows) == len(self.stored) == made_with["count"]:
            raise ValueError(f"the token cache {folder} is damaged: delete it and encode again")
        self.labelled = self.rows["label"].null_count == 0
        self._passes: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def tokens(self) -> np.ndarray:
        """All tokens [N, h, w] (or moments [N, 2C, h, w]) as they are stored, not mirrored."""
        return self.stored[np.arange(len(self))]

    def _pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the order [N] of the samples in a pass, and which of them are mirrored."""
        if number not in self._passes:
            rng = np.random.default_rng([self.seed, number])
            drawn = rng.permutation(len(self)), rng.random(len(self)) < 0.5
            before = {n: kept for n, kept in self._passes.items() if n == number - 1}
            self._passes = {**before, number: drawn}
        return self._passes[number]

    def batch(self, positions: np.ndarray) -> dict[str, Any]:
        """Return the samples at positions [B] of the endless list of permutations."""
        where = np.empty(len(positions), np.int64)
        mirror = np.zeros(len(positions), bool)
        passes, offsets = np.divmod(positions, len(self))
        for number in np.unique(passes):
            order, coins = self._pass(int(number))
            here = passes == number
            where[here], mirror[here] = order[offsets[here]], coins[offsets[here]]
        values = self.stored[where]  # [B, h, w], or [B, 2C, h, w]
        if self.mirrored is not None and mirror.any():
            values[mirror] = self.mirrored[where[mirror]]
        rows = self.rows.take(where).to_pydict()
        batch: dict[str, Any] = {self.content: torch.from_numpy(values.astype(WIDE[self.content]))}
        batch |= {"caption": rows["caption"], "key": rows["key"]}
        if self.labelled:
            batch["label"] = torch.tensor(rows["label"])
        return batch

    def stream(self, epoch: int = 0, rank: int = 0, world: int = 1) -> DataLoader:
        """Return the loader of a virtual epoch."""
        return DataLoader(
            TokenStream(self, epoch, rank, world),
            batch_size=None,
            generator=torch.Generator().manual_seed(self.seed),  # leaves the global one alone
        )

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the trainer's current epoch."""
        trainer = self.trainer
        if trainer is None:
            return self.stream()
        return self.stream(trainer.current_epoch, trainer.global_rank, trainer.world_size)

"""Shards encoded once, to tokens or to moments of latents, and the DataModule that reads them.

For every training shard 00000.safetensors holds `tokens` [N, h, w] (and `tokens_flip`, the tokens
of the mirrored images) and 00000.parquet key, caption and label of the same rows. Continuous
autoencoders have `moments` [N, 2C, h, w] in place of tokens: the mean and the logarithm of the
variance of the posterior, of which a latent is drawn anew at every read. Further views of the same
pictures, such as the tokens of reduced ones, stand beside them under their own names. cache.json
says what made them and is written last.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from data.files import atomic, write_json
from data.images import to_tensor
from data.select import frozen, mirrored, visited
from data.shards import Sample, SkipCounter, apply
from data.stream import EpochData
from data.view import MAX_SKIPPED, ShardList, View
from data.webdata import ShardPictures, WebData

SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.string()),
        ("caption", pyarrow.string()),
        ("label", pyarrow.int64()),
        ("row", pyarrow.int64()),  # number among the samples of the shard, good and bad
    ]
)


class Encoder(NamedTuple):
    """A first stage as a cache needs it.

    `encode` maps images [B, 3, H, W] in [-1, 1] to tokens [B, h, w] below `num_codes`, or, where
    that is None, to moments [B, 2C, h, w].
    """

    encode: Callable[[Tensor], Tensor]
    num_codes: int | None


def content(num_codes: int | None) -> str:
    """Return what a cache's first view is called: tokens of a codebook, or moments without one."""
    return "moments" if num_codes is None else "tokens"


def encode_shard(
    path: Path,
    url: str,
    shards: ShardList,
    view: View,
    encoders: dict[str, Encoder],
    *,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    max_skipped: float = MAX_SKIPPED,
    stamp: str = "",
) -> None:
    """Encode one training shard, unless that is done; every picture is decoded once for all views.

    Augmentation freezes: with crop "random" an image keeps one crop, drawn from its key; with
    `view.flip` the mirrored image is encoded too. All batches have one shape: the last is filled
    with its last picture and cut afterwards, so a row does not depend on the size of the shard.

    Args:
        path: what to write, NNNNN.safetensors; the captions go into NNNNN.parquet beside it.
        url: the shard.
        shards: the training split, which says which keys belong to it.
        view: how samples become pictures.
        encoders: the views by name; the first is stored as "tokens" or "moments", whatever its
            name. Tokens take 2 bytes, 4 above 65,536 codes; moments half precision.
        batch_size: images encoded at once.
        device: where the encoders work.
        max_skipped: share of bad samples at which a ValueError is raised.
        stamp: names all that the content depends on; a file with the same one is kept.

    Raises:
        ValueError: too many bad samples, a token outside the codebook, or a moment that half
            precision cannot hold.
    """
    if _finished(path, stamp):
        return
    first, *others = encoders.items()
    views = {content(first[1].num_codes): first[1], **dict(others)}
    read = ShardPictures(shards, view, view.seed, max_skipped)
    skips, total = read.skips, 0

    def numbered() -> Iterator[Sample]:
        nonlocal total
        for sample in read.rows(shards.paths.index(url), 0):
            if sample is not None:
                yield {**sample, "row": total}
            total += 1

    def seen(sample: Sample) -> Sample:
        made = visited(sample, view, frozen(view, sample["key"]), flip=False)
        return {**made, "row": sample["row"]}

    samples = apply(seen, numbered(), skips)
    grids: dict[str, list[np.ndarray]] = {}
    rows: list[dict[str, Any]] = []
    while batch := list(islice(samples, batch_size)):
        rows += [{column: s.get(column) for column in SCHEMA.names} for s in batch]
        filled = batch + batch[-1:] * (batch_size - len(batch))
        images = to_tensor(np.stack([s["pixels"] for s in filled])).to(device)  # [B, 3, H, W]
        for ending, shown in {"": images, "_flip": images.flip(-1)}.items():
            if ending and not view.flip:
                continue
            for name, encoder in views.items():
                with torch.no_grad():
                    made = encoder.encode(shown).cpu().numpy()[: len(batch)]
                grids.setdefault(name + ending, []).append(_packed(made, encoder.num_codes, path))
    # what comes from a channels-last tensor is not laid out as a file holds it
    tensors = {name: np.ascontiguousarray(np.concatenate(parts)) for name, parts in grids.items()}
    table = pyarrow.Table.from_pylist(rows, SCHEMA)
    with atomic(path.with_suffix(".parquet")) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")
    # one entry: the order of several in the file is another one in every process
    about = {"stamp": stamp, "rows": total, "skipped": skips.counts, "examples": skips.examples}
    told = {"encoded": json.dumps(about)}
    with atomic(path) as temporary:  # last: it stands for both
        save_file(tensors, temporary, told)


def _packed(encoded: np.ndarray, num_codes: int | None, path: Path) -> np.ndarray:
    """Return tokens of the codebook in 2 or 4 bytes, moments in half precision."""
    if num_codes is None:
        with np.errstate(over="ignore"):
            moments = encoded.astype(np.float16)  # [B, 2C, h, w]
        if not np.isfinite(moments).all():
            raise ValueError(f"a moment of {path} is no finite number of half precision")
        return moments
    if encoded.min() < 0 or encoded.max() >= num_codes:
        raise ValueError(f"a token of {path} is outside the {num_codes} codes")
    return encoded.astype(np.uint16 if num_codes <= 2**16 else np.int32)  # [B, h, w]


def _finished(path: Path, stamp: str) -> bool:
    """Say whether a shard was encoded to its end with this stamp."""
    with suppress(OSError, SafetensorError), safe_open(path, "numpy") as stored:
        return _told(stored).get("stamp") == stamp and path.with_suffix(".parquet").exists()
    return False


def _told(stored: Any) -> dict[str, Any]:
    return json.loads((stored.metadata() or {}).get("encoded", "{}"))


def _read(path: Path) -> tuple[dict[str, Any], set[str], pyarrow.Table]:
    """Return what an encoded shard says of itself, the names of its views, and its captions."""
    file = path
    try:
        with safe_open(path, "numpy") as stored:
            told, views = _told(stored), set(stored.keys())
        file = path.with_suffix(".parquet")
        return told, views, pyarrow.parquet.read_table(file, schema=SCHEMA)
    except (OSError, SafetensorError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{file} is missing or damaged: delete the token cache and encode again"
        ) from error


def finish_cache(
    folder: Path,
    count: int,
    settings: dict[str, Any],
    skips: SkipCounter | None = None,
    rows: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Write cache.json over `count` encoded shards.

    Args:
        folder: with 00000.safetensors and so on.
        count: number of shards.
        settings: plain values that a reader wants to know: "tokenizer" (sha256 of its file) and
            "num_codes" are what `count_tokens` compares.
        skips: counts what was left out of all shards.
        rows: samples of every shard, good and bad, as training from the shards counts them; by
            default those that were read.

    Returns:
        Its content: `settings`, "shards", "count", "rows", and "skipped", the counts of `skips`.

    Raises:
        ValueError: a file that is missing or damaged, too many bad samples, or no sample at all.
    """
    kept, skips, read = 0, skips or SkipCounter(), []
    for path in _files(folder, count):
        told, _, table = _read(path)
        kept += len(table)
        read.append(told["rows"])
        skips.counts.update(told["skipped"])  # not judged by windows: the whole set is known
        skips.examples |= told["examples"]
    skips.check()
    if not kept:
        raise ValueError("the training shards hold no sample to encode")
    summary = {**settings, "shards": count, "count": kept, "rows": list(rows or read)}
    summary |= skips.found()
    write_json(folder / "cache.json", summary)
    return summary


def _files(folder: Path, count: int) -> list[Path]:
    return [folder / f"{index:05d}.safetensors" for index in range(count)]


def count_tokens(folder: Path, num_codes: int, sha256: str | None = None) -> Tensor:
    """Count how often every code occurs in a cache, mirrored images included: [num_codes] int64.

    Raises:
        ValueError: no cache, or one of another tokenizer (of that sha256, where one is given).
    """
    if not (folder / "cache.json").is_file():
        raise ValueError(f"{folder} is no finished cache of tokens: there is no cache.json")
    made = json.loads((folder / "cache.json").read_text())
    if made["num_codes"] != num_codes or sha256 not in (None, made["tokenizer"]):
        raise ValueError(f"{folder} was made with another tokenizer, of {made['num_codes']} codes")
    counts = torch.zeros(num_codes, dtype=torch.int64)
    for path in _files(folder, made["shards"]):
        with safe_open(path, "np") as stored:
            for name in {"tokens", "tokens_flip"}.intersection(stored.keys()):
                tokens = torch.from_numpy(stored.get_tensor(name).astype(np.int64))
                counts += torch.bincount(tokens.flatten(), minlength=num_codes)
    return counts


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


class CachedRows:
    """The rows of a cache, numbered as in its source shards, see `data.order.Source`."""

    def __init__(self, data: "TokenData"):
        self.data = data

    def rows(self, shard: int, first: int) -> Iterator[int | None]:
        """Yield numbers of rows of the cache, and None where the shard holds a bad sample."""
        data = self.data
        start, end = data.starts[shard], data.starts[shard + 1]
        places = data.places[start:end]
        at = int(np.searchsorted(places, first))
        for place in range(first, data.read[shard]):
            here = at < len(places) and places[at] == place
            yield int(start) + at if here else None
            at += here

    def show(self, row: int, visit: int) -> tuple[int, bool]:
        """Say whether this pass sees a row mirrored."""
        data = self.data
        if not data.flips:
            return row, False
        return row, mirrored(f"{data.seed}/{visit}/{data.rows['key'][row].as_py()}")

    def stack(self, samples: list[tuple[int, bool]]) -> dict[str, Any]:
        """Read rows."""
        rows, mirror = zip(*samples, strict=True)
        return self.data.batch(np.array(rows), np.array(mirror))

    def take(self) -> tuple[dict[str, int], dict[str, str]]:
        """Return that nothing is left out."""
        return {}, {}


class TokenData(EpochData):
    """Batches {"tokens" [B, h, w] int64, "caption" list, "key" list, "label" [B] if given}.

    A cache of moments gives "moments" [B, 2C, h, w] float32 in place of tokens; further views come
    under their own names. Rows are small and mapped from their files, so no workers are needed.

    Args:
        folder: a finished cache.
        batch_size: samples in a batch of one rank.
        seed: seed of the training; order and mirrors, the same as from the shards.
        epoch_batches: batches of a virtual epoch in one rank.
        shuffle_buffer: rows that are shuffled together, see `EpochData`.
        val: gives the validation batches.

    Raises:
        ValueError: no finished cache in the folder, or a damaged file.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        batch_size: int,
        seed: int = 0,
        epoch_batches: int = 100,
        shuffle_buffer: int = 1000,
        val: WebData | None = None,
    ):
        super().__init__(
            batch_size=batch_size,
            seed=seed,
            epoch_batches=epoch_batches,
            shuffle_buffer=shuffle_buffer,
            workers=0,
            skips=SkipCounter(),
        )
        self.val = val
        folder = Path(folder)
        try:
            made = json.loads((folder / "cache.json").read_text())
            paths, count = _files(folder, made["shards"]), made["count"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder} holds no finished token cache: no cache.json") from error
        told, names, tables = zip(*map(_read, paths), strict=True)
        self.rows = pyarrow.concat_tables(tables)
        self.starts = np.cumsum([0, *map(len, tables)])  # of every shard, in rows of the cache
        self.places = self.rows["row"].to_numpy()
        self.read = [part["rows"] for part in told]
        self.counted = tuple(made["rows"])
        self.views = {name: StoredRows(paths, name) for name in sorted(set().union(*names))}
        if not {len(self.rows), *map(len, self.views.values())} == {count}:
            raise ValueError(
                f"the token cache {folder} is damaged, its files do not hold the {count} rows of "
                "cache.json: delete it and encode again"
            )
        self.labelled = self.rows["label"].null_count == 0
        self.flips = any(name.endswith("_flip") for name in self.views)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, where: np.ndarray, mirror: np.ndarray) -> dict[str, Any]:
        """Return the rows of these numbers [B], mirrored where that is said [B]."""
        batch: dict[str, Any] = self.rows.select(["key", "caption"]).take(where).to_pydict()
        for name in (name for name in self.views if not name.endswith("_flip")):
            values = self.views[name][where]  # tokens [B, h, w], or moments [B, 2C, h, w]
            if f"{name}_flip" in self.views and mirror.any():
                values[mirror] = self.views[f"{name}_flip"][where[mirror]]
            wide = np.float32 if values.dtype == np.float16 else np.int64
            batch[name] = torch.from_numpy(values.astype(wide))
        if self.labelled:
            batch["label"] = torch.tensor(self.rows["label"].take(where).to_pylist())
        return batch

    def shard_rows(self) -> tuple[int, ...]:
        """Return how many rows every source shard has."""
        return self.counted

    def source(self) -> CachedRows:
        """Return what reads the cache."""
        return CachedRows(self)

    def join(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the only part that there is."""
        return parts[0]

    def val_dataloader(self) -> Any:
        """Return the loader of the validation batches, [] without any."""
        if self.val is None:
            return []
        self.val.trainer = self.trainer
        return self.val.val_dataloader()

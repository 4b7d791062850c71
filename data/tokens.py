"""The DataModule that reads a cache of encoded shards: tokens or moments, and captions."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors import safe_open
from torch import Tensor

from data.cache import SCHEMA, reading, variant
from data.cached import read_index
from data.select import caption_of, drawn, mirrored
from data.shards import SkipCounter
from data.stream import EpochData
from data.webdata import WebData


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


class StoredText:
    """States of the captions of several encoded shards, read when they are asked for.

    Args:
        paths: the text files.
        counts: captions of each.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int]):
        self.starts = np.cumsum([0, *counts])
        self.files: list[Any] = []
        self.ends: list[Tensor] = []
        for path, count in zip(paths, counts, strict=True):
            with reading(path):
                file = safe_open(path, "pt")
                lengths = file.get_tensor("lengths")  # [C + 1]
            if len(lengths) != count + 1:
                raise ValueError(f"{path} does not hold the states of {count} captions")
            self.files.append(file)
            self.ends.append(lengths.cumsum(0))

    def __call__(self, captions: np.ndarray) -> dict[str, Tensor]:
        """Return the states of the captions of these numbers [B], and of the empty one.

        Returns:
            "states" [T, D], "lengths" [B + 1] and, where there are, "pooled" [B + 1, P].
        """
        parts = np.searchsorted(self.starts, captions, side="right") - 1
        places = [*zip(parts, (captions - self.starts[parts]).tolist(), strict=True)]
        places.append((0, len(self.ends[0]) - 1))
        states, pooled = [], []
        for part, place in places:
            file, ends = self.files[part], self.ends[part]
            first = int(ends[place - 1]) if place else 0
            states.append(file.get_slice("states")[first : int(ends[place])])
            if "pooled" in file.keys():
                pooled.append(file.get_slice("pooled")[place : place + 1])
        made = {
            "states": torch.cat(states),
            "lengths": torch.tensor([len(rows) for rows in states]),
        }
        return {**made, "pooled": torch.cat(pooled)} if pooled else made


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
        for place in range(first, data.read_rows[shard]):
            here = at < len(places) and places[at] == place
            yield int(start) + at if here else None
            at += here

    def show(self, row: int, visit: int) -> tuple[int, int]:
        """Return what a pass needs to know."""
        return row, visit

    def stack(self, samples: list[tuple[int, int]]) -> dict[str, Any]:
        """Read rows."""
        rows, visits = zip(*samples, strict=True)
        return self.data.read(np.array(rows), visits)

    def take(self) -> tuple[dict[str, int], dict[str, str]]:
        """Return that nothing is left out."""
        return {}, {}


class TokenData(EpochData):
    """Batches {"tokens" [B, h, w] int64, "caption" list, "key" list, "label" [B] if given}.

    A cache of moments gives "moments" [B, 2C, h, w] float32 in place of tokens; further views come
    under their own names. With `text`, "text" holds the states of the captions and of the empty
    one, see `StoredText`. Rows are small and mapped from their files, so no workers are needed.

    Args:
        folder: a finished cache.
        batch_size: samples in a batch of one rank.
        seed: seed of the training; order, mirrors and captions, the same as from the shards.
        epoch_batches: batches of a virtual epoch in one rank.
        shuffle_buffer: rows that are shuffled together, see `EpochData`.
        val: gives the validation batches.
        text: read the states of captions.

    Raises:
        ValueError: no finished cache in the folder, a damaged file, or no states in it.
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
        text: bool = False,
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
        index = read_index(folder)
        paths = [folder / f"{part['name']}.safetensors" for part in index["parts"]]
        tables, names = [], set()
        for path in paths:
            with reading(path), safe_open(path, "numpy") as stored:
                names |= {*stored.keys()}
            table = path.with_suffix(".parquet")
            with reading(table):
                tables.append(pyarrow.parquet.read_table(table, schema=SCHEMA))
        self.rows = pyarrow.concat_tables(tables)
        self.starts = np.cumsum([0, *map(len, tables)])  # of every shard, in rows of the cache
        self.places = self.rows["row"].to_numpy()
        self.read_rows = [part["read"] for part in index["parts"]]
        self.counted = tuple(part["counted"] for part in index["parts"])
        self.tensors = {name: StoredRows(paths, name) for name in sorted(names)}
        if not {len(self.rows), *map(len, self.tensors.values())} == {index["count"]}:
            raise ValueError(
                f"the token cache {folder} is damaged, its files do not hold the {index['count']} "
                "rows of cache.json: encode again"
            )
        self.crops: int = index["made"]["crops"]
        endings = [variant("", i, m) for i in range(self.crops) for m in (False, True)]
        self.views = [n for n in self.tensors if not n.endswith(tuple(e for e in endings if e))]
        self.flips: bool = index["made"]["flip"]
        self.labelled = self.rows["label"].null_count == 0
        several = self.rows["captions"].to_pylist() if text else []
        self.captions = np.cumsum([0, *map(len, several)])  # number of a row's first caption
        self.text: StoredText | None = None
        if text:
            if index["made"]["text"] is None:
                raise ValueError(f"{folder} holds no states of captions")
            counts = [sum(map(len, table["captions"].to_pylist())) for table in tables]
            files = [path.with_suffix(".text.safetensors") for path in paths]
            self.text = StoredText(files, counts)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: np.ndarray, visits: Sequence[int]) -> dict[str, Any]:
        """Return the samples of rows [B]; crop, mirror and caption follow from key and pass."""
        found = self.rows.select(["key", "captions", "label"]).take(rows).to_pydict()
        captions, variants, chosen = [], [], []
        for visit, key, texts in zip(visits, found["key"], found["captions"], strict=True):
            draw = f"{self.seed}/{visit}/{key}"
            crop = drawn(draw, "crop").randrange(self.crops) if self.crops > 1 else 0
            variants.append((crop, self.flips and mirrored(draw)))
            captions.append(caption_of(texts, draw))
            chosen.append(texts.index(captions[-1]))
        batch: dict[str, Any] = {"key": found["key"], "caption": captions}
        for name in self.views:
            batch[name] = self._values(name, rows, variants)
        if self.labelled:
            batch["label"] = torch.tensor(found["label"])
        if self.text is not None:
            batch["text"] = self.text(self.captions[rows] + chosen)
        return batch

    def _values(self, view: str, rows: np.ndarray, variants: Sequence[tuple[int, bool]]) -> Tensor:
        """Return tokens [B, h, w] int64 or moments [B, 2C, h, w] float32 of variants [B]."""
        names = [variant(view, crop, mirror) for crop, mirror in variants]
        values: np.ndarray | None = None
        for name in {*names}:
            here = np.array([name == other for other in names])  # [B]
            part = self.tensors[name][rows[here]]
            if values is None:
                values = np.empty((len(rows), *part.shape[1:]), part.dtype)
            values[here] = part
        assert values is not None
        return torch.from_numpy(
            values.astype(np.float32 if values.dtype == np.float16 else np.int64)
        )

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

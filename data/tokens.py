"""The DataModule that reads a cache of encoded shards: tokens or moments, and captions."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from data.cache import SCHEMA, reading, variant
from data.cached import read_index
from data.webdata import EpochData, WebData


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


class TokenData(EpochData):
    """Batches {"tokens" [B, h, w] int64, "caption" list, "key" list, "label" [B] if given}.

    A cache of moments gives "moments" [B, 2C, h, w] float32 in place of tokens; further views come
    under their own names. With `text`, "text" holds the states of the captions and of the empty
    one, see `StoredText`. Rows are small and mapped from their files, so no workers are needed.

    Args:
        folder: a finished cache.
        batch_size: samples in a batch of one rank.
        seed: seed of the training; order, crops and mirrors, and the choice of a caption.
        epoch_batches: batches of a virtual epoch in one rank.
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
        val: WebData | None = None,
        text: bool = False,
    ):
        super().__init__()
        self.batch_size, self.seed, self.epoch_batches = batch_size, seed, epoch_batches
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
        self.tensors = {name: StoredRows(paths, name) for name in sorted(names)}
        if not {len(self.rows), *map(len, self.tensors.values())} == {index["count"]}:
            raise ValueError(
                f"the token cache {folder} is damaged, its files do not hold the {index['count']} "
                "rows of cache.json: encode again"
            )
        self.crops: int = index["made"]["crops"]
        endings = [variant("", i, m) for i in range(self.crops) for m in (False, True)]
        self.views = [n for n in self.tensors if not n.endswith(tuple(e for e in endings if e))]
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
        self._passes: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def _pass(self, number: int) -> np.ndarray:
        """Return the order [N] of the samples in a pass."""
        if number not in self._passes:
            order = np.random.default_rng([self.seed, number]).permutation(len(self))
            before = {n: kept for n, kept in self._passes.items() if n == number - 1}
            self._passes = {**before, number: order}
        return self._passes[number]

    def batch(self, positions: np.ndarray) -> dict[str, Any]:
        """Return the samples at positions [B] of the endless list of permutations."""
        passes, offsets = np.divmod(positions, len(self))
        orders = {int(number): self._pass(int(number)) for number in np.unique(passes)}
        where = np.array([orders[p][i] for p, i in zip(passes, offsets, strict=True)])  # [B]
        return self.read(where, passes)

    def read(self, rows: np.ndarray, visits: np.ndarray) -> dict[str, Any]:
        """Return the samples of rows [B]; crop, mirror and caption follow from key and visit."""
        found = self.rows.select(["key", "captions", "label"]).take(rows).to_pydict()
        captions, variants, chosen = [], [], []
        for visit, key, texts in zip(visits, found["key"], found["captions"], strict=True):
            rng = random.Random(f"{self.seed}/{visit}/{key}")
            variants.append((rng.randrange(self.crops), rng.random() < 0.5))
            chosen.append(rng.randrange(len(texts)))
            captions.append(texts[chosen[-1]])
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
        names = [name if name in self.tensors else name.removesuffix("_flip") for name in names]
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

    def stream(self, epoch: int = 0, rank: int = 0, world: int = 1) -> DataLoader:
        """Return the loader of a virtual epoch."""
        return DataLoader(
            TokenStream(self, epoch, rank, world),
            batch_size=None,
            generator=torch.Generator().manual_seed(self.seed),  # leaves the global one alone
        )

    def val_dataloader(self) -> Any:
        """Return the loader of the validation batches, [] without any."""
        if self.val is None:
            return []
        self.val.trainer = self.trainer
        return self.val.val_dataloader()

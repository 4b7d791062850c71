"""Scoring is map and reduce: an extractor makes rows of pictures, a scorer makes scores of rows.

No scorer sees a picture, so a set of any size is scored in the memory that its rows take.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, device

from data.files import atomic
from eval.frechet import Moments


@dataclass(frozen=True)
class Measured:
    """What is kept of pictures."""

    rows: Mapping[str, np.ndarray]
    """[N, ...] by name, one row per picture, in small types."""
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    """Arrays by name that are added over batches."""
    shown: np.ndarray | None = None
    """[k, 2, 3, H, W] uint8, pairs of original and reconstruction for the page."""
    models: dict[str, str] = field(default_factory=dict)
    """What made the rows of a name, stored beside the scores that are made of them."""
    moments: Mapping[str, Moments] = field(default_factory=dict)
    """Those of a reference of which no rows are kept, by the name of the rows."""

    def __len__(self) -> int:
        return len(self.rows[next(iter(self.rows))]) if self.rows else 0


Asked = Sequence[Mapping[str, Any]]
"""What was asked of each picture: prompt or caption, attributes, label, ..."""
Measure = Callable[[Tensor, Asked, int], Measured]


class Extractor(Protocol):
    """A frozen dataclass of plain fields; what is not a field cannot change the rows."""

    def load(self, device: device | str, *, folder: Path, first_stage: Any = None) -> Measure:
        """Make ready to measure.

        Args:
            device: where networks run.
            folder: where networks that do not ship are trained and kept.
            first_stage: encodes [B, 3, H, W] in [-1, 1] and decodes, for those who ask it.

        Returns:
            images [B, 3, H, W] uint8 on the CPU, what was asked of each and the index of the first
            picture to what is kept of them.
        """
        ...


def save_measured(path: Path, measured: Measured) -> None:
    """Write rows as safetensors, whole or not at all; equal rows give equal bytes."""
    arrays = {f"rows.{k}": np.ascontiguousarray(v) for k, v in measured.rows.items()}
    arrays |= {f"sums.{k}": v for k, v in measured.sums.items()}
    if measured.shown is not None:
        arrays["shown"] = np.ascontiguousarray(measured.shown)
    # a file sorts its arrays; the scores of rows come in the order of the rows
    content = {"models": measured.models, "rows": [*measured.rows], "sums": [*measured.sums]}
    with atomic(path) as temporary:
        save_file(arrays, temporary, metadata={"measured": json.dumps(content)})


class RowFiles(Mapping[str, np.ndarray]):
    """Rows in files of successive batches: in memory only while somebody holds them.

    Args:
        names: the rows' names in their order.
        files: every file and the number of its rows.
    """

    def __init__(self, names: Sequence[str], files: Sequence[tuple[Path, int]]) -> None:
        self.names, self.files = names, files

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.names:
            raise KeyError(name)
        rows, first = np.empty(0), 0
        for path, count in self.files:
            with safe_open(path, "np") as file:
                part = file.get_tensor(f"rows.{name}")
            if first == 0:  # filled part by part, so that the set is in memory once
                rows = np.empty((sum(c for _, c in self.files), *part.shape[1:]), part.dtype)
            rows[first : first + count] = part
            first += count
        return rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def load_measured(paths: Sequence[Path]) -> Measured:
    """Read what `save_measured` wrote: rows and shown pictures in the order of paths, sums added.

    Rows are read when they are asked for, and again each time: of a set of 30,000 pictures only
    those that a score is made of are in memory.

    Raises:
        ValueError: no file, a file that holds no rows, or files of different extractors.
    """
    if not paths:
        raise ValueError("there are no rows to score: no picture was measured")
    parts, counts = zip(*(_load(path) for path in paths), strict=True)
    _check_alike(parts, paths)
    rows = RowFiles([*parts[0].rows], list(zip(paths, counts, strict=True)))
    return replace(_without_rows(parts), rows=rows)


def joined(parts: Sequence[Measured]) -> Measured:
    """Join what was measured of successive batches.

    Raises:
        ValueError: parts of different extractors.
    """
    _check_alike(parts, range(len(parts)))
    rows = {k: np.concatenate([p.rows[k] for p in parts]) for k in parts[0].rows}
    return replace(_without_rows(parts), rows=rows)


def _check_alike(parts: Sequence[Measured], names: Sequence[Any]) -> None:
    first = parts[0]
    for name, part in zip(names, parts, strict=True):
        same = ([*part.rows], part.sums.keys()) == ([*first.rows], first.sums.keys())
        if not same or part.models != first.models:
            raise ValueError(f"rows {name} were measured in another way; delete them to redo them")


def _without_rows(parts: Sequence[Measured]) -> Measured:
    """Sums added, shown pictures in order."""
    shown = [p.shown for p in parts if p.shown is not None]
    return Measured(
        {},
        {k: reduce(np.add, [p.sums[k] for p in parts]) for k in parts[0].sums},
        np.concatenate(shown) if shown else None,
        parts[0].models,
    )


def _load(path: Path) -> tuple[Measured, int]:
    """What a file holds, and the number of its rows."""
    try:
        with safe_open(path, "np") as file:
            content = json.loads((file.metadata() or {})["measured"])
            counts = [file.get_slice(f"rows.{k}").get_shape()[0] for k in content["rows"]]
            sums = {k: file.get_tensor(f"sums.{k}") for k in content["sums"]}
            shown = file.get_tensor("shown") if "shown" in file.keys() else None
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} holds no rows; delete it to measure again") from error
    rows = RowFiles(content["rows"], [(path, counts[0])])
    return Measured(rows, sums, shown, content["models"]), counts[0]


def reduced(images: Tensor, side: int) -> Tensor:
    """Reduce square pictures [B, 3, H, W] uint8 to `side` by area averaging; smaller ones stay.

    Raises:
        ValueError: a side that does not divide theirs.
    """
    width = images.shape[-1]
    if width <= side:
        return images
    if width % side or images.shape[-2] != width:
        raise ValueError(f"pictures of {list(images.shape[-2:])} do not reduce to {side} px")
    return F.avg_pool2d(images.float(), width // side).round().to(images.dtype)

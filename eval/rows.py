"""Scoring is map and reduce: an extractor makes rows of pictures, a scorer makes scores of rows.

No scorer sees a picture, so a set of any size is scored in the memory that its rows take.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, device

from data.files import atomic


@dataclass(frozen=True)
class Measured:
    """What is kept of pictures."""

    rows: dict[str, np.ndarray]
    """[N, ...] by name, one row per picture, in small types."""
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    """Arrays by name that are added over batches."""
    shown: np.ndarray | None = None
    """[k, 2, 3, H, W] uint8, pairs of original and reconstruction for the page."""
    models: dict[str, str] = field(default_factory=dict)
    """What made the rows of a name, stored beside the scores that are made of them."""

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))


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


def load_measured(paths: Sequence[Path]) -> Measured:
    """Read what `save_measured` wrote: rows and shown pictures in the order of paths, sums added.

    Raises:
        ValueError: no file, a file that holds no rows, or files of different extractors.
    """
    if not paths:
        raise ValueError("there are no rows to score: no picture was measured")
    return joined([_load(path) for path in paths], paths)


def joined(parts: Sequence[Measured], names: Sequence[Any] | None = None) -> Measured:
    """Join what was measured of successive batches, which a message calls by their `names`.

    Raises:
        ValueError: parts of different extractors.
    """
    first = parts[0]
    for name, part in zip(names or range(len(parts)), parts, strict=True):
        same = (part.rows.keys(), part.sums.keys()) == (first.rows.keys(), first.sums.keys())
        if not same or part.models != first.models:
            raise ValueError(f"rows {name} were measured in another way; delete them to redo them")
    shown = [p.shown for p in parts if p.shown is not None]
    return Measured(
        {k: np.concatenate([p.rows[k] for p in parts]) for k in first.rows},
        {k: reduce(np.add, [p.sums[k] for p in parts]) for k in first.sums},
        np.concatenate(shown) if shown else None,
        first.models,
    )


def _load(path: Path) -> Measured:
    try:
        with safe_open(path, "np") as file:
            content = json.loads((file.metadata() or {})["measured"])
            arrays = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} holds no rows; delete it to measure again") from error
    rows, sums = ({k: arrays[f"{kind}.{k}"] for k in content[kind]} for kind in ("rows", "sums"))
    return Measured(rows, sums, arrays.get("shown"), content["models"])


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

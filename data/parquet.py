"""Parquet files with pictures inside, as Hugging Face's datasets writes them.

A picture is a struct {bytes, path} or plain bytes; captions, label and key stand in columns that
are found by their names, or by the features that `datasets` keeps in the file.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from data.listing import inside, is_picture
from data.names import aliased, aliases, texts
from data.remote import is_remote, open_shard

BATCH = 64  # rows that are in memory at once


class Columns(NamedTuple):
    """Which columns of a parquet file hold what."""

    image: str
    others: tuple[str, ...]
    """Columns of texts, numbers, and lists of texts."""
    classes: dict[str, list[str]]
    """Column of labels -> names of the classes."""

    @classmethod
    def of(cls, schema: pyarrow.Schema, url: str) -> "Columns":
        """Find them.

        Raises:
            ValueError: no column holds pictures.
        """
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = told.get("info", {}).get("features", {})
        kinds = {n: f.get("_type") for n, f in features.items() if isinstance(f, dict)}
        named = [name for name, kind in kinds.items() if kind == "Image"]
        named += [name for name in aliases("image") if name in schema.names]
        image = next((n for n in named if n in schema.names and _bytes(schema.field(n).type)), None)
        if image is None:
            raise ValueError(
                f"{url} has no column of pictures (bytes, or a struct of bytes and path): it has "
                f"{', '.join(schema.names)}"
            )
        classes = {n: features[n].get("names") or [] for n, k in kinds.items() if k == "ClassLabel"}
        others = (f.name for f in schema if f.name != image and not _bytes(f.type))
        return cls(image, tuple(others), classes)


def _bytes(kind: pyarrow.DataType) -> bool:
    """Say whether a column can hold encoded pictures."""
    if pyarrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def read_parquet(url: str, first: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the raw samples of a parquet file from row `first` on.

    Raises:
        OSError: the file cannot be read.
        ValueError: no column holds pictures.
        pyarrow.ArrowException: no parquet, or a damaged one.
    """
    with open_shard(url) as source, pyarrow.parquet.ParquetFile(source) as file:
        columns = Columns.of(file.schema_arrow, url)
        names = [columns.image, *columns.others]
        for number, row in _rows(file, names, first):
            image = row.pop(columns.image)
            files = {**_picture(image, url), **_told(row, columns)}
            yield {**files, "__key__": _key(url, number, row), "__url__": url}


def _rows(
    file: pyarrow.parquet.ParquetFile, names: list[str], first: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and values of the rows from `first` on; groups before it are not read."""
    number, groups = 0, list[int]()
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if groups or number + count > first:
            groups.append(group)
        else:
            number += count
    for batch in file.iter_batches(BATCH, row_groups=groups, columns=names):
        passed = min(len(batch), max(0, first - number))
        yield from enumerate(batch.slice(passed).to_pylist(), number + passed)
        number += len(batch)


def _key(url: str, number: int, row: dict[str, Any]) -> str:
    key = aliased("key", row)
    return f"{Path(url).stem}/{number:06d}" if key is None else str(key)


def count_parquet(url: str) -> int:
    """Return how many rows a parquet file has, 0 where it cannot be read."""
    with suppress(OSError, pyarrow.ArrowException), open_shard(url) as source:
        return pyarrow.parquet.read_metadata(source).num_rows
    return 0


def parquet_keys(url: str) -> Iterator[str]:
    """Yield the key of every picture without reading any, as far as the file can be read."""
    with (
        suppress(OSError, pyarrow.ArrowException),
        open_shard(url) as source,
        pyarrow.parquet.ParquetFile(source) as file,
    ):
        names = [name for name in aliases("key") if name in file.schema_arrow.names]
        if not names:
            yield from (_key(url, number, {}) for number in range(file.metadata.num_rows))
        else:
            yield from (_key(url, number, row) for number, row in _rows(file, names, 0))


def _picture(image: Any, url: str) -> dict[str, bytes]:
    """Return suffix -> bytes of a picture; nothing where there is none."""
    data, path = (
        (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    )
    if data is None and path and not is_remote(url):
        file = inside(os.path.dirname(url), path)
        if file is not None and os.path.isfile(file):
            with open(file, "rb") as opened:
                data = opened.read()
    if not data:
        return {}
    suffix = os.path.splitext(path)[1][1:].lower() if path and is_picture(path) else "jpg"
    return {suffix: data}


def _told(row: dict[str, Any], columns: Columns) -> dict[str, bytes]:
    """Return a row's captions, label and numbers as the JSON of a sample."""
    captions = texts(aliased("caption", row))
    label = next((row[name] for name in columns.classes if row.get(name) is not None), None)
    names = next(iter(columns.classes.values()), [])
    if label is None:
        label = aliased("label", row)
    if not captions and type(label) is int and 0 <= label < len(names):
        captions = (names[label].replace("_", " "),)
    meta = {name: value for name, value in row.items() if isinstance(value, (int, float, str))}
    told = {**meta, "caption": list(captions)}
    if type(label) is int:
        told["label"] = label
    return {"json": json.dumps(told).encode()}

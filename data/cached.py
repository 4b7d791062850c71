"""What a cache of encoded shards says of itself in cache.json; plain values, nothing heavy."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

INDEX = "cache.json"


class Difference(NamedTuple):
    """A value in which two plain containers, such as the settings of two caches, differ."""

    name: str
    one: Any
    other: Any


def read_index(folder: Path | str) -> dict[str, Any]:
    """Read what a finished cache says of itself.

    Returns:
        "made" (the settings that its content depends on), "parts" (a list in the order of the
        shards: {"name", "source", "rows" that it has, "read" samples of the shard, good and bad,
        "counted" as training from the shards counts them, "files": name -> sha256}), "count"
        (rows), "skipped" (counts of what was left out) and "about" (what it was made of, for who
        reads it: "data", settings, and "tokenizer", the path of the file).

    Raises:
        ValueError: there is no finished cache in the folder.
    """
    path = Path(folder) / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if {"made", "parts", "count", "about"} <= index.keys():
            return index
    except (OSError, ValueError, AttributeError):
        pass
    if path.is_file():
        raise ValueError(f"{path} is damaged, or none of this version: encode again")
    raise ValueError(f"{folder} holds no finished cache of tokens: there is no {INDEX}")


def part_names(shards: Sequence[str]) -> list[str]:
    """Name the part of every shard: its path below what all have in common, without its suffix.

    So a part keeps its name when other shards come or go. Where two would have one name, as those
    of one place in a list that repeats, all are numbered.
    """
    folders = [shard.replace(os.sep, "/").rpartition("/")[0].split("/") for shard in shards]
    levels = [{*level} for level in zip(*folders, strict=False)]
    shared = next((i for i, level in enumerate(levels) if len(level) > 1), len(levels))
    names = [
        "-".join([*folder[shared:], os.path.basename(shard).partition(".")[0]])
        for folder, shard in zip(folders, shards, strict=True)
    ]
    return names if len({*names}) == len(names) else [f"{i:05d}" for i in range(len(names))]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    """List the values in which two plain containers differ, by dotted name."""
    mine, theirs = dict(_flat(one)), dict(_flat(other))
    names = [*mine, *(name for name in theirs if name not in mine)]
    return [
        Difference(name, mine.get(name), theirs.get(name))
        for name in names
        if mine.get(name) != theirs.get(name)
    ]


def _flat(value: Any, at: str = "") -> list[tuple[str, Any]]:
    """Return the leaves by dotted name; a list of plain values is one."""
    if isinstance(value, Mapping):
        inside = [*value.items()]
    elif isinstance(value, (list, tuple)) and any(isinstance(v, (Mapping, list)) for v in value):
        inside = [*enumerate(value)]
    else:
        return [(at, value)]
    pairs = ((f"{at}.{name}" if at else str(name), inner) for name, inner in inside)
    return [leaf for name, inner in pairs for leaf in _flat(inner, name)]

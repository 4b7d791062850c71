"""Patterns of shard files; light to import."""

import glob
import os
import re
from collections.abc import Sequence

from braceexpand import braceexpand


def expand_shards(pattern: str | Sequence[str]) -> list[str]:
    """List the files of a shard pattern, in its order.

    Args:
        pattern: a path, a folder (its *.tar), brace ranges such as {00000..00009} or {a,b}, a
            glob, several of these with commas between, or a list of them. A path that exists may
            hold commas and braces.

    Raises:
        ValueError: a part that nothing matches, or a file that a brace range names does not exist.
    """
    if not isinstance(pattern, str):
        return [shard for part in pattern for shard in expand_shards(part)]
    parts = re.split(r",(?![^{]*\})", pattern)
    found: list[str] = []
    while parts:
        for count in range(len(parts), 0, -1):  # the comma may be one of a path
            part = ",".join(parts[:count]).strip()
            try:
                found += _matches(part)
                break
            except ValueError as error:
                if count == 1:
                    raise ValueError(f"shard pattern {pattern!r}: {error}") from error
        parts = parts[count:]
    return found


def _matches(pattern: str) -> list[str]:
    """List the files of a pattern without commas between paths."""
    whole = os.path.expanduser(pattern)
    names = [whole] if os.path.exists(whole) else map(os.path.expanduser, braceexpand(pattern))
    found: list[str] = []
    for name in names:
        if re.match(r"\w+:", name):
            raise ValueError(f"{pattern} is not a local path")
        if os.path.isdir(name):
            name = os.path.join(glob.escape(name), "*.tar")
        matched = [name] if os.path.isfile(name) else sorted(glob.glob(name))
        if not matched and name != pattern and not glob.has_magic(name):
            raise ValueError(
                f"{name} does not exist; a glob such as *.tar takes the shards that there are"
            )
        if not matched:
            raise ValueError(f"no shard matches {name}")
        found += matched
    return found

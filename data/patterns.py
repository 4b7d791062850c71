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
            glob, several of these with commas between, or a list of them.

    Raises:
        ValueError: nothing matches, or a file that a brace range names does not exist.
    """
    if not isinstance(pattern, str):
        return [shard for part in pattern for shard in expand_shards(part)]
    found: list[str] = []
    for part in re.split(r",(?![^{]*\})", pattern):
        for name in map(os.path.expanduser, braceexpand(part.strip())):
            if re.match(r"\w+:", name):
                raise ValueError(f"shard pattern {pattern!r}: {name} is not a local path")
            if os.path.isdir(name):
                name = os.path.join(glob.escape(name), "*.tar")
            if os.path.isfile(name):
                found.append(name)
            elif glob.has_magic(name):
                found += sorted(glob.glob(name))
            elif "{" in part:
                raise ValueError(
                    f"shard pattern {pattern!r}: {name} does not exist; "
                    "a glob such as *.tar takes the shards that there are"
                )
    if not found:
        raise ValueError(f"no shard matches {pattern!r}")
    return found

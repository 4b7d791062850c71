"""Patterns of shard files; light to import."""

import glob
import os
import re
from collections.abc import Sequence

from braceexpand import braceexpand

from data.remote import PIPE, is_remote, listed


def expand_shards(pattern: str | Sequence[str], allow_pipe: bool = False) -> list[str]:
    """List the files of a shard pattern, in its order.

    Args:
        pattern: a path, a folder (its *.tar), brace ranges such as {00000..00009} or {a,b}, a
            glob, a URL of any of these, pipe:COMMAND with brace ranges, several of these with
            commas between, or a list of them. A path that exists may hold commas and braces, a
            command commas.
        allow_pipe: let pipe:COMMAND be a shard, which runs the command.

    Raises:
        ValueError: a part that nothing matches, a file that a brace range names does not exist, or
            a pipe that is not allowed.
    """
    if not isinstance(pattern, str):
        return [shard for part in pattern for shard in expand_shards(part, allow_pipe)]
    if pattern.strip().startswith(PIPE):
        if not allow_pipe:
            raise ValueError(f"{pattern!r} runs a command; add data.allow_pipe=true to allow it")
        return list(braceexpand(pattern.strip()))
    parts = re.split(r",(?![^{]*\})", pattern)
    found: list[str] = []
    while parts:
        # the comma may be one of a path
        most = 1 if is_remote(parts[0].strip()) else len(parts)
        for count in range(most, 0, -1):
            part = ",".join(parts[:count]).strip()
            try:
                found += _remote(part) if is_remote(part) else _matches(part)
                break
            except (ValueError, OSError) as error:
                if count == 1:
                    raise ValueError(f"shard pattern {pattern!r}: {error}") from error
        parts = parts[count:]
    return found


def _remote(pattern: str) -> list[str]:
    """List the shards of a URL; those of brace ranges are asked for when they are read."""
    found: list[str] = []
    for url in braceexpand(pattern):
        names = _looked_up(url) if glob.has_magic(url) or _is_folder(url) else [url]
        if not names:
            raise ValueError(f"no shard matches {url}")
        found += names
    return found


def _is_folder(url: str) -> bool:
    return not os.path.splitext(url.partition("?")[0])[1]


def _looked_up(url: str) -> list[str]:
    """List a remote folder or glob; a URL with ? is a query where its store knows no globs."""
    return [url] if url.startswith("http") and "?" in url else listed(url)


def _matches(pattern: str) -> list[str]:
    """List the files of a pattern without commas between paths."""
    whole = os.path.expanduser(pattern)
    names = [whole] if os.path.exists(whole) else map(os.path.expanduser, braceexpand(pattern))
    found: list[str] = []
    for name in names:
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

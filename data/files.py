"""Files that appear whole or not at all, and what names their content; every room may use it."""

import codecs
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

FULL = 1_000_000  # bytes below which a disk that failed is called full
BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside `path`, which takes its place when the block ends well.

    A block that fails leaves neither; what stood at `path` before stays. The folder is made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.stat().st_nlink == 1:
            temporary.chmod(0o644)  # some writers keep files from everybody else
        os.replace(temporary, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # the name that a person knows
        raise
    except Exception as error:
        if shutil.disk_usage(path.parent).free < FULL:  # libraries hide it in errors of their own
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, content: Any) -> None:
    """Write plain containers as JSON, whole or not at all.

    Raises:
        ValueError: a number that is not finite, which JSON does not know.
    """
    write_text(path, json.dumps(content, indent=1, allow_nan=False))


def decode_text(content: bytes) -> str:
    """Decode UTF-8, or what a byte order mark says.

    Raises:
        ValueError: it is neither, or holds a NUL.
    """
    encoding = next((name for mark, name in BOMS.items() if content.startswith(mark)), "utf-8")
    text = content.decode(encoding)
    if "\0" in text:
        raise ValueError("it holds a NUL")
    return text


def file_hash(path: Path | str) -> str:
    """Return the sha256 of a file's bytes as 64 hex digits; read once per path, size and mtime."""
    status = os.stat(path)
    return _hashed(os.path.abspath(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hashed(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link(source: Path | str, target: Path | str) -> None:
    """Let a file also stand at `target`, as a hard link; a copy where the disk cannot link."""
    with atomic(target) as temporary:
        try:
            os.link(os.path.realpath(source), temporary)
        except OSError:
            shutil.copyfile(source, temporary)

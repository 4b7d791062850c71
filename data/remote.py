"""Shards that stand anywhere: local files, URLs of fsspec (s3, gs, http, memory, ...), and pipes.

A remote read that fails is tried again from where it stood, and one that stands still is given up
after a time, so no training hangs on a dead connection. With a cache a remote shard is copied once
to a local folder of bounded size and read from there.
"""

import fcntl
import hashlib
import io
import math
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any, TypeVar

from filelock import FileLock, Timeout

from data.files import atomic

T = TypeVar("T")
BLOCK = 2**22  # bytes of one remote read
PIPE = "pipe:"
COPY = re.compile(r"\.?[0-9a-f]{24}(\..*)?")  # names of copies, of their locks and unfinished ones
RANGES: dict[str, tuple[type[int] | type[float], float, float]] = {
    "retries": (int, 0, 100),
    "backoff": (float, 0, 3600),
    "stall": (float, 0.001, 1e6),
    "cache_bytes": (int, 0, 1e18),
}


@dataclass(frozen=True)
class Access:
    """How this machine reaches remote shards; nothing of it changes what they hold.

    So it is no setting of a run: TOKENGRID_SHARD_CACHE=DIR in the environment sets `cache`, and
    _CACHE_BYTES, _STALL, _RETRIES and _BACKOFF behind TOKENGRID_SHARD the others.
    """

    retries: int = 4
    """How often a failed read is tried again before the shard counts as broken."""
    backoff: float = 0.5
    """Seconds before the first of these tries; doubled before each further one."""
    stall: float = 60.0
    """Seconds without an answer after which a read has failed."""
    cache: str | None = None
    """Folder of local copies; none reads every shard over the network in every pass."""
    cache_bytes: int = 100 * 10**9
    """Bytes that the copies may fill, with those that are being made by all processes; the ones not
    read for longest go first. A shard that finds no room is read over the network."""


def access_here() -> Access:
    """Return what the environment says.

    Raises:
        ValueError: a variable that is no number, or out of range.
    """
    found: dict[str, Any] = {}
    for field in fields(Access):
        name = f"TOKENGRID_SHARD_{field.name.upper()}"
        if (text := os.environ.get(name)) is None:
            continue
        if field.name == "cache":
            found["cache"] = text
            continue
        kind, least, most = RANGES[field.name]
        value = math.nan
        with suppress(ValueError):
            value = float(text)
        # nan and inf are in no range
        if not least <= value <= most or kind(value) != value:
            what = "whole number" if kind is int else "number"
            raise ValueError(f"{name} must be a {what} from {least} to {most:g}, got {text!r}")
        found[field.name] = kind(value)
    return Access(**found)


class StalledError(OSError):
    """A remote shard that does not answer."""


def is_remote(url: str) -> bool:
    """Say whether a shard is a URL or a pipe, not a local path."""
    return re.match(r"[a-zA-Z][\w+.-]+:", url) is not None and not re.match(r"[a-zA-Z]:\\", url)


def open_shard(url: str, access: Access | None = None) -> IO[bytes]:
    """Open a shard for reading from its start.

    Args:
        url: local path, URL that fsspec knows, or pipe:COMMAND, whose output is the shard.
        access: how remote shards are reached.

    Raises:
        OSError: it cannot be opened, or does not answer; names the shard.
        ValueError: a kind of URL that no installed package serves.
    """
    if not is_remote(url):
        return open(url, "rb")
    access = access or access_here()
    if url.startswith(PIPE):
        return _piped(url, access)
    if access.cache is not None:
        return _cached(url, access, Path(access.cache))
    return io.BufferedReader(_Remote(url, access), BLOCK)


def size_of(url: str, access: Access | None = None) -> int:
    """Return the bytes of a shard; 0 for a pipe, which does not tell."""
    if url.startswith(PIPE):
        return 0
    return _Remote(url, access or access_here()).length if is_remote(url) else os.path.getsize(url)


def stamp_of(url: str) -> tuple[int, int]:
    """Return what tells a shard from one that replaces it: size, and time or tag as a number.

    Raises:
        OSError: it is not there.
    """
    if not is_remote(url):
        status = os.stat(url)
        return status.st_size, status.st_mtime_ns
    if url.startswith(PIPE):
        return 0, 0
    system, path = _system(url)
    try:
        about = _watched(lambda: system.info(path), url, access_here())
    except FileNotFoundError:
        raise FileNotFoundError(f"{url} does not exist") from None
    names = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
    mark = next((str(about[name]) for name in names if about.get(name)), "")
    return int(about.get("size") or 0), int.from_bytes(hashlib.sha256(mark.encode()).digest()[:6])


def stamps_of(urls: Sequence[str]) -> list[tuple[int, int]]:
    """Return `stamp_of` of many shards, remote ones side by side."""
    if not any(map(is_remote, urls)):
        return list(map(stamp_of, urls))
    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(stamp_of, urls))


def listed(url: str) -> list[str]:
    """Return the shards that a remote glob or folder names, sorted.

    Raises:
        OSError: the store does not answer.
    """
    system, path = _system(url)
    folder = not any(sign in path for sign in "*?[") and not path.endswith((".tar", ".parquet"))
    pattern = path.rstrip("/") + "/*.tar" if folder else path
    found = _watched(lambda: system.glob(pattern), url, access_here())
    return sorted(system.unstrip_protocol(name) for name in found)


def _system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL and the path in it."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} cannot be read here: {error}") from error


def _watched(work: Callable[[], T], url: str, access: Access) -> T:
    """Do remote work in a thread of its own; one that does not end in time is left behind.

    Raises:
        StalledError: no answer.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def act() -> None:
        try:
            done.append(work())
        except BaseException as error:  # told to who waits
            failed.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(access.stall)
    if failed:
        raise failed[0]
    if not done:
        raise StalledError(f"{url} gave no answer for {access.stall:g} s")
    return done[0]


class _Remote(io.RawIOBase):
    """A remote file that goes on where a failed read stood."""

    def __init__(self, url: str, access: Access):
        self.url, self.access = url, access
        self.system, self.path = _system(url)
        self.position = 0
        self.whole: bytes | None = None  # of a server that sends no parts
        size = self._try(lambda: self.system.size(self.path))
        if size is None:
            self.whole = self._try(lambda: self.system.cat_file(self.path))
        self.length = len(self.whole or b"") if size is None else int(size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        self.position = max(0, start + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        first = self.position
        last = min(self.length, first + len(buffer))
        if first >= last:
            return 0
        data = self._part(first, last)
        if not data:
            raise OSError(f"{self.url} ends at byte {first} of {self.length}")
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def _part(self, first: int, last: int) -> bytes:
        if self.whole is None:
            data = self._try(lambda: self.system.cat_file(self.path, start=first, end=last))
            if len(data) <= last - first:
                return data
            self.whole = data
        return self.whole[first:last]

    def _try(self, work: Callable[[], T]) -> T:
        for attempt in range(self.access.retries + 1):
            try:
                return _watched(work, self.url, self.access)
            except FileNotFoundError:  # waiting brings no file
                raise FileNotFoundError(f"{self.url} does not exist") from None
            except Exception as error:  # every store has errors of its own
                if attempt == self.access.retries:
                    if isinstance(error, StalledError):
                        raise
                    tries = f"after {attempt + 1} tries" if attempt else "at the first try"
                    raise OSError(f"{self.url} failed {tries}: {error}") from error
                time.sleep(self.access.backoff * 2**attempt)
        raise AssertionError("the loop returns or raises")


def _piped(url: str, access: Access) -> IO[bytes]:
    """Return the output of a command as a temporary file, since a tar is read with seeks."""
    output, errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    command = ["sh", "-c", url.removeprefix(PIPE)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
    ) as process:
        source = process.stdout
        assert source is not None
        try:
            # what there is, not a whole block: a slow command does not stand still
            while block := _watched(lambda: os.read(source.fileno(), BLOCK), url, access):
                output.write(block)
        except StalledError:
            os.killpg(process.pid, signal.SIGKILL)  # the shell and what it started
            raise
    if process.returncode:
        errors.seek(0)
        said = (errors.read().decode(errors="replace").strip().splitlines() or ["nothing"])[-1]
        raise OSError(f"{url} ended with {process.returncode} and said: {said}")
    output.seek(0)
    return output


def _cached(url: str, access: Access, folder: Path) -> IO[bytes]:
    """Open the local copy of a remote shard, which is made once whoever asks for it."""
    size, mark = stamp_of(url)
    name = hashlib.sha256(f"{url} {size} {mark}".encode()).hexdigest()[:24]
    path = folder / f"{name}{os.path.splitext(url)[1]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(_lock_of(path)):
        if path.exists() or _copied(url, access, path):
            os.utime(path)
            file = open(path, "rb")
            fcntl.flock(file, fcntl.LOCK_SH)  # until it is closed nobody deletes it
            return file
    return io.BufferedReader(_Remote(url, access), BLOCK)


def _copied(url: str, access: Access, path: Path) -> bool:
    """Copy a shard whose lock is held; False where there is no room for it."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
        left.unlink(missing_ok=True)
    remote, deciding = _Remote(url, access), FileLock(path.parent / ".room.lock")
    with io.BufferedReader(remote, BLOCK) as source, ExitStack() as stack:
        with deciding:
            if not _make_room(path.parent, access.cache_bytes - remote.length):
                return False
            copy = stack.enter_context(atomic(path))
            copy.touch()
            os.truncate(copy, remote.length)  # so that others count it whole from here on
        with open(copy, "r+b") as target:
            while block := source.read(BLOCK):
                target.write(block)
        with deciding:  # who makes room sees either name
            stack.close()
    return True


def _make_room(folder: Path, room: int) -> bool:
    """Delete the copies not read for longest until the rest fits into `room` bytes.

    Unfinished copies count whole, and go where their process is gone. False: not enough can go.
    """
    copies, filled = [], 0
    for path in filter(lambda path: COPY.fullmatch(path.name), folder.iterdir()):
        hidden = path.name.startswith(".")
        if path.suffix == ".lock" or (hidden and _deleted(path)):
            continue
        with suppress(FileNotFoundError):  # its maker failed
            status = path.stat()
            filled += status.st_size
            if not hidden:
                copies.append((status.st_mtime, status.st_size, path))
    for _, size, path in sorted(copies):
        if filled <= room:
            break
        if _deleted(path):
            filled -= size
    return filled <= room


def _deleted(path: Path) -> bool:
    """Delete a copy, finished or not; False where somebody makes, opens or reads it."""
    try:
        with FileLock(_lock_of(path), timeout=0), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except (Timeout, BlockingIOError):
        return False
    except FileNotFoundError:
        pass
    return True


def _lock_of(path: Path) -> Path:
    """Return the lock of a copy; it stays, since those who wait for it must all have the same."""
    return path.with_name(f".{path.name.lstrip('.')[:24]}.lock")

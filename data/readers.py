"""How the raw samples of a shard are read; the ending of its name chooses the reader.

A raw sample is suffix -> bytes with `__key__`, `__url__` (the file that holds it), and `__fault__`
where it must be left out for what its files are. Raw samples are numbered as they lie in the shard,
good and bad.

A key is webdataset's: the path in the tar up to the first dot of the file name. Names that begin
with a dot, such as the ._ files that macOS adds, are no members. Nothing that a tar holds is
written, followed or unpickled.
"""

import os
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, NamedTuple

from data.listing import IMAGE_KEYS, count_listing, listing_keys, read_listing
from data.parquet import count_parquet, parquet_keys, read_parquet
from data.remote import PIPE, open_shard
from data.remote import stamp_of as stamp

UNSAFE_NAME = "unsafe name"
LINK = "link instead of a file"
CUT = "cut off with its shard"

Sample = dict[str, Any]
Member = tuple[str, bytes | None, str]  # name, content, and why it must not be used


class Reader(NamedTuple):
    """What reads one kind of shard."""

    read: Callable[[str, int], Iterator[Sample]]
    """The raw samples of a shard from that number on; raises once what can be read is yielded."""
    count: Callable[[str], int]
    """How many raw samples can be read of it; no content is read where that can be avoided."""
    keys: Callable[[str], Iterator[str]]
    """The keys of those, in order."""


def reader_of(url: str) -> Reader:
    """Return what reads a shard.

    Raises:
        ValueError: its name has another ending than those of READERS.
    """
    if url.startswith(PIPE):
        return READERS[".tar"]
    ending = next((name for name in READERS if url.lower().endswith(name)), None)
    if ending is None:
        raise ValueError(f"{url} is no shard: its name ends in none of {', '.join(READERS)}")
    return READERS[ending]


def split_name(name: str) -> tuple[str, str]:
    """Return the key of a file in a tar, and its suffix in lower case; "" where it has none."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    key = f"{folder}{slash}{stem}"
    # a name that is not UTF-8 becomes one: texts and tables hold no other
    return key.encode(errors="surrogateescape").decode(errors="backslashreplace"), suffix.lower()


def is_member(name: str) -> bool:
    """Say whether a file of a tar belongs to a sample: its name does not begin with a dot."""
    return not os.path.basename(name).startswith(".")


def is_image(name: str) -> bool:
    """Say whether a file name, or one with dots that lost its key, ends as an image's does."""
    return "." in name and name.lower().rpartition(".")[2] in IMAGE_KEYS


def grouped(members: Iterable[Member], url: str) -> Iterator[Sample]:
    """Put files that follow each other and have one key together; a suffix comes once in a sample.

    As webdataset does, but a suffix that repeats begins another sample.
    """
    key, files = "", Sample()
    for name, data, fault in members:
        its_key, suffix = split_name(name)
        if files and (its_key != key or suffix in files):
            yield {**files, "__key__": key, "__url__": url}
            files = {}
        if suffix:
            key = its_key
            files[suffix] = data
            if fault:
                files["__fault__"] = fault
    if files:
        yield {**files, "__key__": key, "__url__": url}


def read_tar(url: str, first: int = 0) -> Iterator[Sample]:
    """Yield the raw samples of a tar from number `first` on.

    Raises:
        OSError: it cannot be opened or read.
        tarfile.TarError: it is damaged; what comes before is yielded.
    """
    errors: list[Exception] = []
    start = 0
    if first:
        starts, _ = _headers(url, *stamp(url))
        if first > len(starts):
            return
        start = starts[first - 1]  # one before, which tells whether the next is whole
    found = grouped(_contents(url, start, errors), url)
    before = last = next(found, None) if first else None
    for sample in found:
        if last is not None and last is not before:
            yield last
        before, last = last, sample
    if last is not None and last is not before:
        # a sample that breaks off lacks files of the one before
        cut = bool(errors) and before is not None and bool(before.keys() - last.keys())
        yield {**last, "__fault__": CUT} if cut else last
    if errors:
        raise errors[0]


def count_tar(url: str) -> int:
    """Return how many raw samples can be read of a tar."""
    return len(_headers(url, *stamp(url))[0])


def tar_keys(url: str) -> Iterator[str]:
    """Yield the keys of the raw samples of a tar, as far as its headers can be read."""
    return iter(_headers(url, *stamp(url))[1])


def _contents(url: str, start: int, errors: list[Exception]) -> Iterator[Member]:
    """Yield the members of a tar from a header on; an error ends it and is added to `errors`."""
    try:
        with _open_tar(url, start) as tar:
            for member in _members(tar):
                fault = _fault(member)
                data = None if fault else tar.extractfile(member).read()  # type: ignore[union-attr]
                yield member.name, data, fault
            # tarfile takes a header that it cannot read for the end, which is marked by zeros
            file, ends = tar.fileobj, False
            assert file is not None
            file.seek(tar.offset)
            while (rest := file.read(2**20)) and (ends := not rest.strip(b"\0")):
                pass
            if not ends:
                raise tarfile.ReadError("the tar breaks off: after its last file there is no end")
    except Exception as error:  # whatever a damaged archive makes of its reader
        errors.append(error)


@contextmanager
def _open_tar(url: str, start: int = 0) -> Iterator[tarfile.TarFile]:
    with open_shard(url) as file, tarfile.open(fileobj=file) as tar:
        if start:
            tar.firstmember, tar.offset = None, start  # type: ignore[attr-defined]
        yield tar


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of samples: files, and links, which stand for none."""
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # or they are all kept
        if is_member(member.name) and (member.isreg() or member.issym() or member.islnk()):
            yield member


def _fault(member: tarfile.TarInfo) -> str:
    """Say why a member must not be used; "" where it may."""
    if not member.isreg():
        return LINK
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return UNSAFE_NAME
    return ""


@lru_cache(maxsize=256)
def _headers(url: str, size: int, mtime_ns: int) -> tuple[array, list[str]]:
    """Return where in a tar the first header of every raw sample stands, and the keys."""
    starts, keys, suffixes = array("q"), list[str](), set[str]()
    with suppress(OSError, tarfile.TarError), _open_tar(url) as tar:
        for member in _members(tar):  # what can be read is counted
            key, suffix = split_name(member.name)
            if not suffix:
                continue
            if not keys or key != keys[-1] or suffix in suffixes:
                starts.append(member.offset)
                keys.append(key)
                suffixes.clear()
            suffixes.add(suffix)
    return starts, keys


READERS: dict[str, Reader] = {
    ".tar": Reader(read_tar, count_tar, tar_keys),
    ".jsonl": Reader(read_listing, count_listing, listing_keys),
    ".parquet": Reader(read_parquet, count_parquet, parquet_keys),
}

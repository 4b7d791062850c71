"""Shards that stand elsewhere: URLs, pipes, broken and stalled connections, local copies."""

import http.server
import io
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data.patterns import expand_shards
from data.remote import Access, StalledError, access_here, is_remote, open_shard, stamp_of
from data.shards import SkipCounter, read_samples, write_shards

QUICK = Access(retries=2, backoff=0.0, stall=0.5)


class Flaky(MemoryFileSystem):
    """Fails or stands still at some reads."""

    protocol = "flaky"
    failures = 0
    stalls = 0.0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_) -> bytes:
        if type(self).failures > 0:
            type(self).failures -= 1
            raise ConnectionError("reset by peer")
        time.sleep(type(self).stalls)
        return super().cat_file(path, start=start, end=end)


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture
def flaky() -> Iterator[type[Flaky]]:
    yield Flaky
    Flaky.failures, Flaky.stalls = 0, 0.0


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    pixels = np.zeros((8, 8, 3), np.uint8)
    samples = [{"key": f"k{i}", "image": pixels + i, "caption": f"number {i}"} for i in range(7)]
    return [Path(p) for p in write_shards(samples, tmp_path / "tars", 3)]


@pytest.fixture
def web(tars: list[Path]) -> Iterator[str]:
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tars[0].parent))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def keys(urls: list[str]) -> list[str]:
    return [s["__key__"] for s in read_samples(urls, SkipCounter())]


def test_a_url_gives_the_samples_of_the_file(web: str, tars: list[Path]) -> None:
    urls = expand_shards(f"{web}/{{00000..00002}}.tar")
    assert [u.rpartition("/")[2] for u in urls] == ["00000.tar", "00001.tar", "00002.tar"]
    assert keys(urls) == keys([str(p) for p in tars]) == [f"k{i}" for i in range(7)]
    assert open_shard(urls[0]).read() == tars[0].read_bytes()  # a server that sends no parts


def test_a_store_is_listed_by_glob_and_folder(tars: list[Path]) -> None:
    memory = fsspec.filesystem("memory")
    for path in tars:
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    urls = expand_shards("memory://bucket/*.tar")
    assert urls == expand_shards("memory://bucket") and len(urls) == 3
    assert expand_shards(f"{urls[0]},{urls[2]}") == [urls[0], urls[2]]
    assert keys(urls) == [f"k{i}" for i in range(7)]
    with pytest.raises(ValueError, match=r"no shard matches memory://bucket/x\*"):
        expand_shards("memory://bucket/x*.tar")


def test_a_read_that_fails_goes_on_where_it_stood(flaky: type[Flaky]) -> None:
    data = random.Random(0).randbytes(9_000_000)
    Flaky().pipe("/a.tar", data)
    flaky.failures = 2
    with open_shard("flaky://a.tar", QUICK) as file:
        assert file.read(1000) == data[:1000]
        flaky.failures = 2
        assert file.read() == data[1000:]
        file.seek(-5, io.SEEK_END)
        assert file.read() == data[-5:] and file.tell() == len(data)
    flaky.failures = 3
    with (
        open_shard("flaky://a.tar", QUICK) as file,
        pytest.raises(OSError, match=r"flaky://a.tar failed after 3 tries: reset by peer"),
    ):
        file.read()


def test_a_shard_that_stands_still_is_lost_and_the_next_is_read(
    flaky: type[Flaky], tars: list[Path], monkeypatch
) -> None:
    for path in tars:
        Flaky().pipe(f"/s/{path.name}", path.read_bytes())
    flaky.stalls = 5.0
    monkeypatch.setenv("TOKENGRID_SHARD_STALL", "0.2")
    monkeypatch.setenv("TOKENGRID_SHARD_RETRIES", "0")
    skips = SkipCounter(1.0)
    begun = time.monotonic()
    found = list(read_samples(["flaky://s/00000.tar", str(tars[1])], skips))
    assert [s["__key__"] for s in found] == ["k3", "k4", "k5"]
    assert time.monotonic() - begun < 4
    told = skips.told("train")
    assert "flaky://s/00000.tar" in told and "gave no answer for 0.2 s" in told


def test_a_server_that_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.tar"
        with pytest.raises(StalledError, match=f"{url} gave no answer for 0.5 s"):
            open_shard(url, Access(retries=0, stall=0.5))


def test_copies_are_made_once_and_make_room(flaky: type[Flaky], tmp_path: Path) -> None:
    names = [f"/c/{i}.tar" for i in range(3)]
    for i, name in enumerate(names):
        Flaky().pipe(name, bytes([i]) * 1000)
    access = Access(0, 0.0, 0.5, cache=str(tmp_path / "copies"), cache_bytes=2500)

    def read(i: int) -> bytes:
        time.sleep(0.02)  # times of use that differ
        with open_shard(f"flaky:/{names[i]}", access) as file:
            return file.read()

    def copies() -> int:
        return len([p for p in (tmp_path / "copies").iterdir() if p.suffix == ".tar"])

    assert read(0) == b"\0" * 1000 and read(1) == b"\1" * 1000 and copies() == 2
    flaky.stalls = 5.0  # nothing is asked of the store again but the stamp
    assert read(0) == b"\0" * 1000
    flaky.stalls = 0.0
    assert read(2) == b"\2" * 1000 and copies() == 2  # 1 was not read for longest
    flaky.stalls = 5.0
    assert read(0) == b"\0" * 1000
    with pytest.raises(StalledError):
        read(1)
    assert not [p for p in (tmp_path / "copies").iterdir() if p.name.endswith(".tmp")]


def cached(folder: Path) -> list[Path]:
    """Copies, finished or not."""
    return [p for p in folder.iterdir() if p.suffix != ".lock"]


def test_processes_keep_the_bound_together(flaky: type[Flaky], tmp_path: Path) -> None:
    for i in range(4):
        Flaky().pipe(f"/p/{i}.tar", bytes([i]) * 1000)
    access = Access(0, 0.0, 5.0, cache=str(tmp_path), cache_bytes=2500)
    flaky.stalls = 0.1  # all four are being copied at once
    found: dict[int, bytes] = {}

    def read(i: int) -> None:
        with open_shard(f"flaky://p/{i}.tar", access) as file:
            found[i] = file.read()

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        sizes = []
        for path in cached(tmp_path):
            with suppress(FileNotFoundError):
                sizes.append(path.stat().st_size)
        assert sum(sizes) <= 2500
    assert found == {i: bytes([i]) * 1000 for i in range(4)}  # two of them not through the cache
    assert len(cached(tmp_path)) == 2


def test_a_copy_that_is_open_stays_and_one_without_room_is_not_made(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for i in range(3):
        memory.pipe(f"/o/{i}.tar", bytes([i]) * 1000)
    access = Access(cache=str(tmp_path), cache_bytes=2500)
    urls = [f"memory://o/{i}.tar" for i in range(3)]
    with open_shard(urls[0], access), open_shard(urls[1], access):
        before = {*cached(tmp_path)}
        with open_shard(urls[2], access) as file:
            assert file.read() == b"\2" * 1000
        assert {*cached(tmp_path)} == before
    with open_shard(urls[2], access):
        assert len(cached(tmp_path)) == 2 and {*cached(tmp_path)} != before


def test_what_a_killed_process_left_goes_and_no_file_of_others(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/k/a.tar", b"1" * 1000)
    left, own = tmp_path / f".{'0' * 24}.tar.99.tmp", tmp_path / "mine.tar"
    left.write_bytes(b"0" * 2000)
    own.write_bytes(b"2" * 3000)
    access = Access(cache=str(tmp_path), cache_bytes=1500)
    with open_shard("memory://k/a.tar", access) as file:
        assert file.read() == b"1" * 1000
    assert not left.exists() and own.exists() and len(cached(tmp_path)) == 2


def test_a_shard_that_was_replaced_is_copied_again(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    access = Access(cache=str(tmp_path))
    for content in (b"one", b"other"):
        memory.pipe("/r/a.tar", content)
        with open_shard("memory://r/a.tar", access) as file:
            assert file.read() == content


def test_a_pipe_runs_only_where_it_is_allowed(tars: list[Path]) -> None:
    pattern = f"pipe:cat {tars[0].parent}/{{00000..00001}}.tar"
    with pytest.raises(ValueError, match=r"add data.allow_pipe=true"):
        expand_shards(pattern)
    urls = expand_shards(pattern, allow_pipe=True)
    assert keys(urls) == [f"k{i}" for i in range(6)]
    with pytest.raises(OSError, match=r"pipe:cat none ended with 1 and said: cat: none: No such"):
        open_shard("pipe:cat none")
    begun = time.monotonic()
    with pytest.raises(StalledError):
        open_shard("pipe:sleep 30", Access(stall=0.3))
    assert time.monotonic() - begun < 10


def test_a_pipe_that_is_slow_does_not_stand_still() -> None:
    slow = "pipe:for i in 1 2 3 4; do printf $i; sleep 0.4; done"
    assert open_shard(slow, Access(stall=1.3)).read() == b"1234"


def test_what_cannot_be_read_is_said_in_a_sentence(web: str) -> None:
    with pytest.raises(ValueError, match=r"nope://x/a.tar cannot be read here: Protocol not known"):
        open_shard("nope://x/a.tar")
    with pytest.raises(FileNotFoundError, match=f"{web}/none.tar does not exist"):
        stamp_of(f"{web}/none.tar")
    assert not is_remote("/a/b.tar") and not is_remote("a:b/c.tar/x"[1:]) and is_remote("s3://a")


def test_the_environment_says_how_shards_are_reached(monkeypatch) -> None:
    monkeypatch.setenv("TOKENGRID_SHARD_CACHE", "copies")
    monkeypatch.setenv("TOKENGRID_SHARD_CACHE_BYTES", "1e9")
    monkeypatch.setenv("TOKENGRID_SHARD_STALL", "3")
    assert access_here() == Access(cache="copies", cache_bytes=10**9, stall=3.0)
    whole, wrong = "must be a whole number from 0 to", "must be a number from 0"
    for name, value, said in [
        ("RETRIES", "some", f"{whole} 100, got 'some'"),
        ("RETRIES", "1.5", f"{whole} 100, got '1.5'"),
        ("CACHE_BYTES", "inf", f"{whole} 1e\\+18, got 'inf'"),
        ("CACHE_BYTES", "-1", f"{whole} 1e\\+18, got '-1'"),
        ("BACKOFF", "nan", f"{wrong} to 3600, got 'nan'"),
        ("STALL", "0", f"{wrong}.001 to 1e\\+06, got '0'"),
    ]:
        with monkeypatch.context() as patch:
            patch.setenv(f"TOKENGRID_SHARD_{name}", value)
            with pytest.raises(ValueError, match=f"^TOKENGRID_SHARD_{name} {said}$"):
                access_here()

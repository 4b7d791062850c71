"""Files of weights: found, downloaded whole and once, known by their checksum, or named."""

import hashlib
import threading
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from eval import downloads
from eval.downloads import (
    CLIPS,
    DINOV2,
    INCEPTION,
    INCEPTION_PT,
    LPIPS_LINEAR,
    VGG16,
    WeightFile,
    checkpoints,
    find_lpips,
)
from eval.extractors import InceptionRows

CONTENT = bytes(range(256)) * 500
RIGHT = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(404 if self.path == "/none" else 200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: 1000 if self.path == "/short" else None])

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A web server that counts what is asked of it."""
    asked: list[str] = []
    handler = type("Counting", (Handler,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}", asked
        web.shutdown()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches of nobody else."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_a_file_is_downloaded_once_by_whoever_comes_first(server: tuple[str, list[str]]) -> None:
    url, asked = server
    file = WeightFile("a network", "net.pt", f"{url}/net.pt", RIGHT)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: file.find(), range(4)))
    assert paths == {checkpoints() / "net.pt"} and asked == ["/net.pt"]
    assert next(iter(paths)).read_bytes() == CONTENT
    assert file.find() in paths and len(asked) == 1
    assert leftovers(checkpoints()) == ["net.pt"]


def test_a_damaged_file_of_a_cache_does_not_count(server: tuple[str, list[str]]) -> None:
    url, asked = server
    file = WeightFile("a network", "net.pt", f"{url}/net.pt", RIGHT)
    checkpoints().mkdir(parents=True)
    (checkpoints() / "net.pt").write_bytes(CONTENT[:-1])
    assert file.find().read_bytes() == CONTENT and asked == ["/net.pt"]


@pytest.mark.parametrize("path", ["none", "short"])
def test_what_cannot_be_had_is_one_sentence(server: tuple[str, list[str]], path: str) -> None:
    file = WeightFile("a network", "net.pt", f"{server[0]}/{path}", RIGHT)
    with pytest.raises(
        ValueError, match="a network is not here and cannot be downloaded: put"
    ) as e:
        file.find()
    told = str(e.value)
    assert str(checkpoints() / "net.pt") in told and file.url in told and "\n" not in told
    assert leftovers(checkpoints()) == []


def test_another_file_than_expected_is_not_kept(server: tuple[str, list[str]]) -> None:
    file = WeightFile("a network", "net.pt", f"{server[0]}/net.pt", "0" * 64)
    with pytest.raises(ValueError, match="another file than expected"):
        file.find()
    assert leftovers(checkpoints()) == []


def test_caches_of_others_are_looked_into(home: Path) -> None:
    file = WeightFile("a network", "net.pt", "http://127.0.0.1:9/", RIGHT, "owner/name")
    folder = home / "hf" / "hub" / "models--owner--name"
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs" / RIGHT).write_bytes(CONTENT)
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "net.pt").symlink_to(folder / "blobs" / RIGHT)
    assert file.find() == folder / "blobs" / RIGHT
    other = WeightFile(
        "a network", "x.pt", "http://127.0.0.1:9/", "0" * 64, "owner/name", ("net.pt",)
    )
    assert other.find() == folder / "blobs" / RIGHT  # the same weights in another layout
    (folder / "blobs" / RIGHT).write_bytes(CONTENT[:100])  # the hub names large files by their hash
    with pytest.raises(ValueError, match="is not here"):
        other.find()
    (home / "tmp").mkdir()
    (home / "tmp" / "net.pt").write_bytes(CONTENT)  # where clean-fid keeps it
    assert file.find() == home / "tmp" / "net.pt"


def test_without_a_checksum_no_file_of_the_same_name_counts(server: tuple[str, list[str]]) -> None:
    url, asked = server
    checkpoints().mkdir(parents=True)
    (checkpoints() / "net.pt").write_bytes(b"of another network")
    one, two = (WeightFile("a network", "net.pt", f"{url}/net.pt", "", f"o/{n}") for n in "ab")
    assert one.find() == checkpoints() / "o--a" / "net.pt" and one.find().read_bytes() == CONTENT
    assert two.find() == checkpoints() / "o--b" / "net.pt" and asked == ["/net.pt"] * 2


def test_a_given_file_is_taken_as_it_is(home: Path) -> None:
    (home / "own.pt").write_bytes(b"x")
    assert InceptionRows.of(home / "own.pt").weights == home / "own.pt"
    with pytest.raises(ValueError, match=r"no file .*missing\.pt with the weights of Inception"):
        InceptionRows.of(home / "missing.pt")


def test_the_parts_of_lpips_lie_side_by_side(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"VGG16 of LPIPS is not here .*vgg16-397923af.pth"):
        monkeypatch.setattr("urllib.request.urlopen", Refused())
        find_lpips()
    checkpoints().mkdir(parents=True, exist_ok=True)
    for name in ("VGG16", "LPIPS_LINEAR"):
        file = replace(getattr(downloads, name), sha256="")
        monkeypatch.setattr(downloads, name, file)
        (checkpoints() / file.name).write_bytes(name.encode())
    folder = find_lpips()
    assert sorted(p.name for p in folder.iterdir()) == ["vgg.pth", "vgg16-397923af.pth"]
    assert find_lpips(folder) == folder == find_lpips()


class Refused:
    def __call__(self, *args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network")


def test_published_files_are_known_by_a_checksum() -> None:
    for file in (INCEPTION, INCEPTION_PT, DINOV2, VGG16, LPIPS_LINEAR, *CLIPS.values()):
        assert len(file.sha256) == 64 or file.repository
        assert file.url.endswith(file.name)
    assert INCEPTION_PT.name.endswith(f"-{INCEPTION_PT.sha256[:8]}.pth")

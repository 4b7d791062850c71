"""Looking at shards: every good sample once, every planted fault under its kind."""

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import inspect
from data.survey import survey_shard
from data.view import View
from experiments.cli import command
from tests import planted


def picture(size: tuple[int, int] = (40, 30), kind: str = "JPEG", mode: str = "RGB") -> bytes:
    rng = np.random.default_rng(sum(size))
    image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).convert(mode)
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


def good(key: str) -> list[tuple[str, bytes | str]]:
    return [(f"{key}.jpg", picture()), (f"{key}.txt", f"a picture {key}".encode())]


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Uneven shards with a fault of each kind, and 31 good samples."""
    folder = tmp_path / "shards"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    planted.tar(folder / "0.tar", [m for i in range(20) for m in good(f"a{i}")])
    planted.tar(
        folder / "1.tar",
        [
            *good("b0"),
            ("c0.jpg", picture()[:-400]),
            ("c0.txt", b"cut off"),
            ("c1.jpg", picture()),
            ("c1.txt", b" \n"),
            ("c2.jpg", picture()),
            ("c3.txt", b"no picture"),
            ("c4.png", planted.with_header(100_000)),
            ("c4.txt", b"too large"),
            ("c5.jpg", b"no picture at all"),
            ("c5.txt", b"noise"),
            ("c6.jpg", picture()),
            ("c6.txt", b"\xff\xfe\xfa bad"),
            ("../d0.jpg", picture()),
            ("../d0.txt", b"outside"),
            ("/tmp/d1.jpg", picture()),
            ("/tmp/d1.txt", b"absolute"),
            ("d2.jpg", "/etc/passwd"),
            ("d2.txt", b"a link"),
            *good("e0"),
            ("e0.pkl", pickle.dumps(Bomb())),
            ("e0.pyd", pickle.dumps(Bomb())),
        ],
    )
    planted.tar(folder / "2.tar", [*good("a0"), *good("f0")])  # a0 is in the first shard, too
    last = planted.tar(folder / "3.tar", [m for i in range(10) for m in good(f"g{i}")])
    whole = last.read_bytes()
    (folder / "3.tar").write_bytes(whole[: len(whole) // 2])
    return folder


def look(shards: Path, *more: str) -> tuple[int, dict[str, Any]]:
    out = shards.parent / "found.json"
    argv = [str(shards), "--cache", str(shards.parent / "cache"), "--json", str(out), *more]
    code = command(inspect.run, argv)
    return code, json.loads(out.read_text())


def test_every_fault_is_counted_under_its_kind(shards: Path, capsys) -> None:
    code, found = look(shards, "--sheet", str(shards.parent / "sheet.png"), "data.max_skipped=0.6")
    counts = {kind: fault["count"] for kind, fault in found["faults"].items()}
    broken = counts.pop("in broken shards (estimated)") + counts.pop("cut off with its shard", 0)
    assert counts == {
        "truncated image": 1,
        "corrupt image": 1,
        "no caption": 2,
        "no image": 1,
        "decompression bomb": 1,
        "bad text": 1,
        "unsafe name": 2,
        "link instead of a file": 1,
    }
    assert 1 <= broken <= 16
    assert "c5 in" in found["faults"]["corrupt image"]["example"]
    assert "3.tar" in found["faults"]["in broken shards (estimated)"]["example"]
    assert found["duplicate_keys"]["count"] == 1 and "2.tar" in found["duplicate_keys"]["example"]
    kept = found["samples"] - 24  # 20 + b0 + e0 + a0 again + f0
    assert kept == 6  # what comes before the tar breaks off
    assert found["width"]["median"] == 40 and found["height"]["most"] == 30
    assert code == 0 and found["stops"] is None
    with Image.open(shards.parent / "sheet.png") as sheet:
        assert sheet.width > 500
    assert not (shards.parent / "pwned").exists() and not Path("/tmp/d1.jpg").exists()
    assert sorted(p.name for p in shards.iterdir()) == ["0.tar", "1.tar", "2.tar", "3.tar"]
    assert "keys seen again" in capsys.readouterr().out


def test_a_fault_of_a_corpus_names_the_picture(tmp_path: Path) -> None:
    root = planted.imagefolder(tmp_path / "root")
    broken = root / "train" / "cat" / "004.png"
    broken.write_bytes(b"no picture at all")
    words = ["--corpus", "imagefolder", "--root", str(root), "--cache", str(tmp_path / "cache")]
    assert command(inspect.run, [*words, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["samples"] == 23
    assert str(broken) in found["faults"]["corrupt image"]["example"]


def test_where_a_run_would_stop_the_exit_code_says_so(shards: Path, capsys) -> None:
    code, found = look(shards, "data.max_skipped=0.1")
    assert code == 1 and "more than max_skipped=0.1 allows" in found["stops"]
    assert "a run would stop: " in capsys.readouterr().out
    code, found = look(shards, "data.min_size=1000", "data.max_skipped=0.6")
    assert code == 1 and found["stops"] == "no sample is left to train on"


def test_filters_are_counted_one_by_one(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    members: list[tuple[str, bytes | str]] = []
    for i in range(8):
        meta = {"aesthetic": i, "pwatermark": i / 8, "width": 100 + i, "height": 100}
        members += [*good(f"k{i}"), (f"k{i}.json", json.dumps(meta).encode())]
    planted.tar(folder / "0.tar", members)
    _, found = look(folder, "data.min_aesthetic=2", "data.max_pwatermark=0.5", "data.min_size=50")
    assert found["removed_by"] == {"min_size": 1.0, "min_aesthetic": 0.25, "max_pwatermark": 0.375}
    _, found = look(folder, "data.min_aesthetic=2", "data.max_pwatermark=0.5")
    assert found["after_filters"] == 3  # 2, 3, 4


def test_a_limit_takes_samples_of_shards_spread_over_all(shards: Path) -> None:
    _, found = look(shards, "--limit", "2", "data.max_skipped=0.9")
    assert found["samples"] == 2 and found["shards"] == 2
    _, found = look(shards, "--limit", "6", "data.max_skipped=0.9")
    assert found["samples"] <= 6 and found["shards"] == 4


def test_processes_share_the_shards_and_find_the_same(shards: Path, tmp_path: Path) -> None:
    _, one = look(shards, "data.max_skipped=0.6")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [str(shards), "--cache", str(tmp_path / "other"), "--json", "two.json", "--workers=2"]
    subprocess.run(
        [sys.executable, "-m", "data.inspect", *words, "data.max_skipped=0.6"],
        check=True,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
    )
    two = json.loads((tmp_path / "two.json").read_text())
    for found in (one, two):
        found.pop("samples_per_second")
    assert one == two


def test_a_survey_of_a_shard_is_the_same_bytes_again(shards: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        survey_shard(tmp_path / name, str(shards / "0.tar"), View(16))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "give either SHARDS or --corpus"),
        (["none.tar"], "no shard matches none.tar"),
        (["a.tar", "--corpus", "cc3m"], "give either SHARDS or --corpus"),
        (["a.tar", "--limit", "0"], "--limit must be at least 1"),
        (["a.tar", "--workers", "0"], "--workers must be at least 1"),
        (["--corpus", "cc3", "--root", "x"], "cc3"),
        (["--corpus", "cc3m", "--root", "nowhere"], "there is no folder nowhere"),
        (["a.tar", "--root", "x"], "--root goes with --corpus NAME"),
        (["--corpus", "ffhq"], "to get it: python download_ffhq.py --images"),
        (["a.tar", "data.min_siz=3"], "min_size"),
    ],
)
def test_wrong_words_are_refused(
    argv: list[str], says: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(inspect.run, argv) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())

"""The command that lists and deletes what the store of stage results holds."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from experiments import store as module
from experiments.cli import command
from experiments.pipeline.stage import Folders, Log, Machine, Stage
from experiments.pipeline.store import Store


@dataclass(frozen=True, eq=False)
class Numbers(Stage):
    """Writes a file of `size` bytes."""

    size: int

    def run(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        (folder / "numbers").write_bytes(bytes(self.size))
        if self.size == 13:
            raise ValueError("bad luck")
        return {}


@dataclass(frozen=True, eq=False)
class Sum(Stage):
    """Builds on numbers."""

    numbers: Numbers

    def run(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        return {}


SHARED, OWN, FREE = Numbers(2_000), Sum(Numbers(2_000)), Numbers(1)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A store with two runs: both use SHARED, one of them OWN, and FREE belongs to none."""
    store = Store(tmp_path / "cache", leader=True)
    store.run([SHARED, OWN, FREE], Machine(), Log(lambda line: None))
    for name, stages in {"a": [SHARED, OWN], "b": [SHARED]}.items():
        (tmp_path / name).mkdir()
        store.remember(tmp_path / name, stages)
    # what is no result: classifiers that were trained once, and foreign folders
    (store.root / "classifiers").mkdir()
    (store.root / "classifiers" / "judge.safetensors").write_text("kept")
    (store.root / "notes").mkdir()
    return store.root


def call(cache: Path, *words: str) -> int:
    return command(module.run, [*words, "--cache", str(cache)])


def there(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if (path / "done.json").exists()}


def test_ls_says_what_each_result_is_for(cache: Path, capsys) -> None:
    assert call(cache, "ls") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line.startswith(("numbers-", "sum-"))}
    assert rows.keys() == {SHARED.folder, OWN.folder, FREE.folder}
    assert rows[FREE.folder].rstrip().endswith("-")
    assert "kB" in rows[SHARED.folder]
    assert lines[-1].startswith("3 results, ")
    assert not any("classifiers" in line or "notes" in line for line in lines)
    a, b = (str(cache.parent / name) for name in "ab")
    users = {entry.folder.name: set(entry.runs) for entry in module.entries(cache)}
    assert users == {SHARED.folder: {a, b}, OWN.folder: {a}, FREE.folder: set()}


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"out": 3}'])
def test_damage_is_no_traceback(content: bytes, cache: Path, capsys) -> None:
    (cache / FREE.folder / "done.json").write_bytes(content)
    assert call(cache, "ls") == 0
    next((cache / "runs").iterdir()).write_bytes(content)
    assert call(cache, "gc", "--yes") == 2  # what nobody is known to need might be needed
    assert "is damaged" in capsys.readouterr().err and FREE.folder in {
        p.name for p in cache.iterdir()
    }


def test_interrupted_work_is_listed_and_collected(cache: Path, capsys) -> None:
    with pytest.raises(ValueError, match="bad luck"):
        Store(cache, leader=True).run([Numbers(13)], Machine(), Log(lambda line: None))
    assert call(cache, "ls") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "interrupted" in next(line for line in lines if line.startswith(Numbers(13).folder))
    assert call(cache, "gc", "--yes") == 0
    assert not (cache / Numbers(13).folder).exists()


def test_gc_deletes_what_no_run_needs(cache: Path) -> None:
    assert call(cache, "gc", "--yes") == 0
    assert there(cache) == {SHARED.folder, OWN.folder} and not (cache / FREE.folder).exists()
    assert (cache / "classifiers" / "judge.safetensors").exists() and (cache / "notes").exists()


def test_a_deleted_run_folder_frees_its_stages(cache: Path, capsys) -> None:
    shutil.rmtree(cache.parent / "a")
    assert call(cache, "gc", "--yes") == 0
    assert there(cache) == {SHARED.folder}
    shutil.rmtree(cache.parent / "b")
    assert call(cache, "gc", "--yes") == 0
    assert there(cache) == set()
    capsys.readouterr()
    assert call(cache, "gc", "--yes") == 0
    assert capsys.readouterr().out == "nothing to delete\n"


def test_a_deleted_result_is_made_again(cache: Path) -> None:
    assert call(cache, "rm", SHARED.folder, "--yes") == 0
    assert there(cache) == {OWN.folder, FREE.folder}
    reused = Store(cache, leader=True).run([SHARED, OWN], Machine(), Log(lambda line: None))
    assert reused == {OWN} and SHARED.folder in there(cache)


def test_rm_takes_names_of_stages(cache: Path, capsys) -> None:
    assert call(cache, "rm", "numbers", "--yes") == 0
    assert there(cache) == {OWN.folder}
    said = capsys.readouterr().out
    a, b = (str(cache.parent / name) for name in "ab")
    assert f"used by {a}, {b}" in said or f"used by {b}, {a}" in said


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 1), ("", 1), (None, 1)])
def test_asks_before_it_deletes(
    cache: Path, answer: str | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    asked: list[str] = []

    def reply(question: str) -> str:
        asked.append(question)
        if answer is None:  # nobody is at the keyboard
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", reply)
    before = there(cache)
    assert call(cache, "gc") == code
    assert len(asked) == 1 and asked[0].startswith("delete 1 result, ")
    assert str(cache / FREE.folder) in capsys.readouterr().out
    assert there(cache) == (before if code else before - {FREE.folder})


@pytest.mark.parametrize("words", [["gc"], ["rm", FREE.folder]])
def test_refuses_a_store_in_work(cache: Path, words: list[str], capsys) -> None:
    """The finished results of a run at work are named by no run folder yet."""
    before = there(cache)
    with FileLock(cache / f".{OWN.folder}.lock"):
        assert call(cache, *words, "--yes") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: a run works on ") and OWN.folder in error
    assert error.count("\n") == 1 and there(cache) == before
    assert call(cache, *words, "--yes") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lss"], "'lss' is not one of ls, rm, gc; did you mean ls?"),
        (["rm"], "rm takes names of results; ls and gc take none"),
        (["ls", "train"], "rm takes names of results; ls and gc take none"),
        (["rm", "number"], "did you mean numbers?"),
        (["gc", "--yess"], "did you mean --yes?"),
    ],
)
def test_wrong_words(cache: Path, words: list[str], said: str, capsys) -> None:
    before = there(cache)
    assert call(cache, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert there(cache) == before


def test_no_store_and_help(tmp_path: Path, capsys) -> None:
    assert call(tmp_path / "none", "ls") == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert command(module.run, []) == command(module.run, ["--help"]) == 0
    assert "rm NAME ..." in capsys.readouterr().out

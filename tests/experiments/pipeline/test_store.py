"""The store: what is made once, by whom, and what an interruption leaves."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from experiments.pipeline import store as stores
from experiments.pipeline.ranks import is_leader, launch
from experiments.pipeline.stage import (
    FileStage,
    Folders,
    Log,
    Machine,
    SplitStage,
    Stage,
    order,
)
from experiments.pipeline.store import Store, duration

ROOT = Path(__file__).parents[3]
Work = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Step(Stage):
    """Does what a test says; that is no field, so not in the key."""

    number: int = 1
    needs: tuple[Stage, ...] = ()
    work: ClassVar[Work] = staticmethod(lambda folder: {})

    def run(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        return type(self).work(folder)


def step(work: Work = lambda folder: {}, number: int = 1, ranks: str = "leader") -> Stage:
    made = type("Step", (Step,), {"work": staticmethod(work), "RANKS": ranks})
    return made(number)


def run(store: Store, stage: Stage, said: list[str] | None = None) -> Path:
    store.run([stage], Machine(), Log((said if said is not None else []).append, "none"))
    return store.folders[stage]


def test_runs_once_then_reuses(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    said: list[str] = []
    calls: list[Path] = []

    def work(folder: Path) -> dict[str, Any]:
        (folder / "weights").write_text("w")
        calls.append(folder)
        return {"loss": 0.5}

    stage = step(work)
    assert store.done(stage) is None and not (tmp_path / "cache").exists()
    log = Log(said.append, "none")
    assert store.run([stage], Machine(), log) == set()
    assert store.run([step(work)], Machine(), log) == {stage}
    folder = tmp_path / "cache" / f"step-{stage.key}"
    assert calls == [folder] == [store.folders[stage]]
    marker = store.done(stage)
    assert marker is not None
    assert marker["what"] == {"loss": 0.5}
    assert marker["fields"] == {"stage": "Step", "version": 1, "number": 1, "needs": []}
    assert marker["seconds"] >= 0 and (marker["name"], marker["key"]) == ("step", stage.key)
    assert said[0] == f"[1/1] step: runs in {folder}"
    assert said[1].startswith("[1/1] step: done in ")
    assert said[2].startswith(f"[1/1] step: reused from {folder}")
    assert sorted(p.name for p in folder.iterdir()) == ["done.json", "weights"]


def test_another_field_is_another_result(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one, two = step(), step(number=2)
    assert run(store, one) != run(store, two) and store.done(two) is not None


def test_what_is_needed_comes_first_and_once() -> None:
    base = Step(1)
    left, right = Step(2, (base,)), Step(3, (Step(1),))
    assert order([Step(4, (left, right)), right]) == [base, left, right, Step(4, (left, right))]
    assert Step(2, (Step(5),)).key != left.key


def test_interrupted_work_is_not_done_and_goes_on(tmp_path: Path) -> None:
    store = Store(tmp_path)
    said: list[str] = []

    def stop(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(store, step(stop), said)
    assert store.done(step()) is None
    folder = run(store, step(lambda folder: {"found": (folder / "half").read_text()}), said)
    assert json.loads((folder / "done.json").read_text())["what"] == {"found": "1"}
    assert said[1] == f"[1/1] step: continues in {folder}"
    assert not (folder / "running.json").exists()


@pytest.mark.parametrize("content", [b'{"name": ', b"[]", b'{"name": "step"}', b"\xff\xfe\x00"])
def test_a_broken_marker_is_no_result(content: bytes, tmp_path: Path) -> None:
    store, said = Store(tmp_path), list[str]()
    folder = run(store, step())
    (folder / "done.json").write_bytes(content)
    assert store.done(step()) is None
    run(store, step(), said)
    assert said[0] == f"[1/1] step: continues in {folder}" and store.done(step()) is not None


@dataclass(frozen=True, eq=False)
class Weights(Step, FileStage):
    """A step whose result stands alone."""


def chain(calls: list[int], base: type[Step] = Weights) -> list[Stage]:
    """Three stages, each of which builds on the one before and writes its number."""

    def work(number: int) -> Work:
        def write(folder: Path) -> dict[str, Any]:
            (folder / "sub").mkdir(exist_ok=True)
            (folder / "sub" / "file").write_text(str(number))
            calls.append(number)
            return {}

        return write

    made: list[Stage] = []
    for number in range(3):
        kind = type("Step", (base,), {"work": staticmethod(work(number))})
        made.append(kind(number, tuple(made[-1:])))
    return made


@pytest.mark.parametrize("how", ["flipped", "shorter", "gone"])
def test_a_damaged_result_is_made_again_where_it_is_read(how: str, tmp_path: Path) -> None:
    calls: list[int] = []
    said: list[str] = []
    store, stages, log = Store(tmp_path), chain(calls), Log(said.append, "none")
    store.run(stages, Machine(), log)
    before = store.done(stages[0])
    file = store.folders[stages[0]] / "sub" / "file"
    file.unlink() if how == "gone" else file.write_text("x" if how == "flipped" else "")
    assert store.run(stages, Machine(), log) == {*stages}  # nobody reads it
    (store.folders[stages[1]] / "done.json").unlink()
    said.clear()
    assert store.run(stages, Machine(), log) == {stages[2]}
    assert calls == [0, 1, 2, 0, 1]
    assert said[0] == f"      {file} is damaged; step is done again"
    after = store.done(stages[0])
    assert before is not None and after is not None and after["files"] == before["files"]
    assert list(after["files"]) == ["sub/file"] and file.read_text() == "0"


def test_the_result_that_was_asked_for_is_always_looked_at(tmp_path: Path) -> None:
    calls: list[int] = []
    store, stages, log = Store(tmp_path), chain(calls), Log([].append, "none")
    store.run(stages, Machine(), log)
    (store.folders[stages[2]] / "sub" / "file").write_text("x")
    assert store.run(stages, Machine(), log) == {*stages[:2]}
    assert calls == [0, 1, 2, 2]


def test_what_a_kill_left_half_written_goes_away(tmp_path: Path) -> None:
    store, stage = Store(tmp_path), step()
    folder = store.folders[stage]
    folder.mkdir()
    (folder / ".resume.ckpt.4242.tmp").write_text("half")
    run(store, stage)
    assert [p.name for p in folder.iterdir()] == ["done.json"]


def test_a_run_folder_is_remembered_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    for stage in (step(), step(number=2)):
        store.remember(tmp_path / "out", [stage])
    (path,) = (tmp_path / "cache" / "runs").iterdir()
    told = {"out": str(tmp_path / "out"), "stages": [step(number=2).folder]}
    assert json.loads(path.read_text()) == told


def test_durations() -> None:
    assert [duration(s) for s in (3.14, 61, 3661)] == ["3.1 s", "1 min 1 s", "1 h 1 min"]


# Several runs at once ----


RACER = """
import os, sys, time
from dataclasses import dataclass
from pathlib import Path
from experiments.pipeline.stage import Log, Machine, Stage
from experiments.pipeline.store import Store

@dataclass(frozen=True, eq=False)
class Race(Stage):
    def run(self, folder, inputs, machine, log):
        with open(folder / "log", "a") as log:
            log.write(f"{os.getpid()}\\n")
        (folder / "begun").touch()
        if sys.argv[2] == "hang":
            time.sleep(600)
        time.sleep(0.7)
        return {}

Store(sys.argv[1]).run([Race()], Machine(), Log(lambda line: print(line, flush=True)))
"""


@dataclass(frozen=True, eq=False)
class Race(Stage):
    """The same stage as in the other processes, quicker."""

    def run(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        return {}


def racer(root: Path, how: str = "finish") -> subprocess.Popen:
    command = [sys.executable, "-c", RACER, str(root), how]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wait_for(path: Path, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_two_processes_work_once(tmp_path: Path) -> None:
    folder = Store(tmp_path).folders[Race()]
    first = racer(tmp_path)
    wait_for(folder / "begun")
    second = racer(tmp_path)
    out = [p.communicate(timeout=60)[0] for p in (first, second)]
    assert first.returncode == second.returncode == 0
    assert len((folder / "log").read_text().split()) == 1
    assert "done in" in out[0]
    assert "waits for another run" in out[1] and "reused" in out[1] and "done in" not in out[1]


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    store = Store(tmp_path)
    killed = racer(tmp_path, "hang")
    wait_for(store.folders[Race()] / "begun")
    killed.kill()
    killed.wait(timeout=30)
    said: list[str] = []
    folder = run(store, Race(), said)
    assert said[0] == f"[1/1] race: continues in {folder}"
    assert said[1].startswith("[1/1] race: done")
    assert not (folder / "running.json").exists()


# Several ranks of one run ----


def test_followers_wait_for_the_leader(tmp_path: Path) -> None:
    worked: list[str] = []
    follower = Store(tmp_path, leader=False)
    thread = threading.Thread(
        target=run, args=(follower, step(lambda folder: worked.append("follower") or {}))
    )
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive() and not worked
    run(Store(tmp_path, leader=True), step(lambda folder: worked.append("leader") or {}))
    thread.join(timeout=10)
    assert not thread.is_alive() and worked == ["leader"]


def test_every_rank_works_once_the_leader_has_begun(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch-7")
    both = threading.Barrier(2, timeout=20)
    worked: list[str] = []
    said: list[str] = []

    def meeting(name: str) -> Stage:
        def meet(folder: Path) -> dict[str, Any]:
            both.wait()
            worked.append(name)
            return {}

        return step(meet, ranks="all")

    follower = threading.Thread(
        target=run, args=(Store(tmp_path, leader=False), meeting("f"), said)
    )
    follower.start()
    run(Store(tmp_path, leader=True), meeting("l"))
    follower.join(timeout=10)
    assert sorted(worked) == ["f", "l"] and said == []


def test_a_mark_of_a_dead_launch_begins_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch-8")
    monkeypatch.setattr(stores, "PAUSE", 0.01)
    worked = threading.Event()
    stage = step(lambda folder: worked.set() or {}, ranks="all")
    store = Store(tmp_path, leader=False)
    folder = store.folders[stage]
    folder.mkdir()
    (folder / "running.json").write_text(json.dumps({"pid": 1_000_000, "launch": "launch-7"}))
    thread = threading.Thread(target=run, args=(store, stage))
    thread.start()
    assert not worked.wait(0.3) and thread.is_alive()
    # Lightning's own launcher starts this process as a child of the leader
    (folder / "running.json").write_text(json.dumps({"pid": os.getppid(), "launch": ""}))
    assert worked.wait(10)
    thread.join(timeout=10)
    (folder / "running.json").unlink()
    worked.clear()
    thread = threading.Thread(target=run, args=(store, stage))
    thread.start()
    assert not worked.wait(0.3)
    (folder / "running.json").write_text(json.dumps({"pid": 1_000_000, "launch": launch()}))
    assert worked.wait(10)
    thread.join(timeout=10)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_rank_0_leads(name: str, monkeypatch) -> None:
    assert is_leader()
    monkeypatch.setenv(name, "0")
    assert is_leader()
    monkeypatch.setenv(name, "1")
    assert not is_leader()


# Stages in parts ----


@dataclass(frozen=True, eq=False)
class Letters(SplitStage):
    """Writes six letters; `made` notes who made which, and is no field."""

    made: ClassVar[list[tuple[str, int]]] = []
    fails_at: ClassVar[int | None] = None

    def parts(self, inputs: Folders, machine: Machine) -> Sequence[str]:
        return [f"{letter}.txt" for letter in "abcdef"]

    def open(
        self, folder: Path, inputs: Folders, machine: Machine, log: Log
    ) -> Callable[[int], None]:
        def make(i: int) -> None:
            if i == type(self).fails_at:
                raise OSError("the disk is full")
            time.sleep(0.02)
            self.made.append((threading.current_thread().name, i))
            (folder / f"{'abcdef'[i]}.txt").write_text(str(i))

        return make

    def finish(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        return {"text": "".join(p.read_text() for p in sorted(folder.glob("?.txt")))}


@pytest.fixture
def letters() -> Letters:
    kind = type("Letters", (Letters,), {"made": [], "fails_at": None})
    return kind()


def test_a_part_is_made_once_and_by_any_rank(letters: Letters, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch-9")
    monkeypatch.setattr(stores, "PAUSE", 0.01)
    ranks = [Store(tmp_path, leader=number == 0) for number in range(3)]
    threads = [threading.Thread(target=run, args=(rank, letters)) for rank in ranks]
    for thread in threads[::-1]:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(i for _, i in letters.made) == [*range(6)]
    assert len({name for name, _ in letters.made}) > 1
    marker = ranks[0].done(letters)
    assert marker is not None and marker["what"] == {"text": "012345"}


def test_parts_that_stand_apart_fail_alone(letters: Letters, tmp_path: Path) -> None:
    store, said = Store(tmp_path), list[str]()

    class Broken(type(letters)):  # type: ignore[misc]
        APART = True
        NAME = "letters"
        mended: ClassVar[bool] = False

        def open(self, *arguments: Any) -> Callable[[int], None]:
            make = super().open(*arguments)

            def mostly(i: int) -> None:
                if i in (1, 4) and not self.mended:
                    raise ValueError(f"shard {i} is broken")
                make(i)

            return mostly

    with pytest.raises(ValueError, match=r"2 of 6 parts .* b\.txt, e\.txt \(first: shard 1 is"):
        run(store, Broken(), said)
    assert [line.strip() for line in said[1:]] == [
        "b.txt failed: shard 1 is broken",
        "e.txt failed: shard 4 is broken",
    ]
    assert store.done(Broken()) is None and [i for _, i in letters.made] == [0, 2, 3, 5]
    Broken.mended = True
    run(store, Broken())
    assert [i for _, i in letters.made] == [0, 2, 3, 5, 1, 4]


def test_a_home_may_hold_what_another_stage_left(tmp_path: Path) -> None:
    home, calls = tmp_path / "out", list[int]()

    def made(number: int) -> Stage:
        return step(lambda folder: calls.append(number) or {}, number)

    for number in (1, 1, 2, 2, 1):
        stage = made(number)
        store = Store(tmp_path / "cache", homes={stage: home})
        assert run(store, stage) == home and store.done(stage) is not None
    assert calls == [1, 2, 1]
    assert not (tmp_path / "cache").exists()


def test_marks_of_homes_may_stand_apart(tmp_path: Path) -> None:
    for name in ("one", "two", "one"):
        letters, home = Letters(), tmp_path / name
        store = Store(tmp_path / "cache", homes={letters: home}, apart=True)
        run(store, letters)
        assert store.done(letters) is not None and store.mark(letters).parent == tmp_path / "cache"
    assert len(Letters.made) == 12
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two")]
    assert files[0] == files[1] and len(files[0]) == 6


def test_parts_of_another_stage_in_a_home_are_asked_for_again(tmp_path: Path) -> None:
    """Whether they still stand is the business of the stage, which makes or keeps them."""
    home = tmp_path / "out"
    home.mkdir()

    def begun(number: int) -> tuple[Store, SplitStage]:
        kind = type("Letters", (Letters,), {"made": [], "fails_at": 3, "VERSION": number})
        return Store(tmp_path, homes={kind(): home}), kind()

    for number, expected in ((1, [0, 1, 2]), (2, [0, 1, 2]), (2, [])):
        store, letters = begun(number)
        with pytest.raises(OSError, match="disk is full"):
            run(store, letters)
        assert [i for _, i in letters.made] == expected  # type: ignore[attr-defined]


def test_only_missing_parts_are_made(letters: Letters, tmp_path: Path) -> None:
    store, said = Store(tmp_path), list[str]()
    type(letters).fails_at = 3
    with pytest.raises(OSError, match="disk is full"):
        run(store, letters, said)
    assert [i for _, i in letters.made] == [0, 1, 2] and store.done(letters) is None
    type(letters).fails_at = None
    folder = run(store, letters, said)
    assert [i for _, i in letters.made] == [*range(6)]
    names = {f"{letter}.txt" for letter in "abcdef"}
    assert {p.name for p in folder.iterdir()} == {*names, "done.json"}  # no lock is left


@pytest.mark.parametrize("damaged", ["b.txt", ".b.txt.sum"])
def test_a_damaged_part_of_unfinished_work_is_made_again(
    damaged: str, letters: Letters, tmp_path: Path
) -> None:
    store, said = Store(tmp_path), list[str]()
    type(letters).fails_at = 3
    with pytest.raises(OSError, match="disk is full"):
        run(store, letters)
    folder = store.folders[letters]
    (folder / damaged).write_text("7")
    type(letters).fails_at = None
    run(store, letters, said)
    assert [i for _, i in letters.made] == [0, 1, 2, 1, 3, 4, 5]
    assert said[1].strip() == f"{folder / 'b.txt'} or a file beside it is damaged; it is made again"
    marker = store.done(letters)
    assert marker is not None and marker["what"] == {"text": "012345"}


def test_a_marker_that_was_changed_is_no_result(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = run(store, step(lambda folder: {"skipped": {10: 1, 9: 2}}))
    marker = (folder / "done.json").read_text()
    assert store.done(step()) is not None
    (folder / "done.json").write_text(marker.replace('"10": 1', '"10": 7'))
    assert store.done(step()) is None


def test_what_a_result_leans_on_is_looked_at_with_it(tmp_path: Path) -> None:
    calls: list[int] = []
    said: list[str] = []
    store, stages, log = Store(tmp_path), chain(calls, Step), Log(said.append, "none")
    store.run(stages, Machine(), log)
    (store.folders[stages[0]] / "sub" / "file").write_text("x")
    assert store.run(stages, Machine(), log) == {*stages[1:]} and calls == [0, 1, 2, 0]


def test_nothing_is_loaded_where_all_parts_are_there(
    letters: Letters, tmp_path: Path, monkeypatch
) -> None:
    store = Store(tmp_path)
    finish = type(letters).finish
    monkeypatch.setattr(type(letters), "finish", None)
    with pytest.raises(TypeError):
        run(store, letters)
    monkeypatch.setattr(type(letters), "finish", finish)
    monkeypatch.setattr(type(letters), "open", None)
    run(store, letters)
    assert store.done(letters) is not None


def test_two_runs_share_the_parts_of_one_stage(
    letters: Letters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both lead a launch of their own, as the tasks of an array do."""
    monkeypatch.setattr(stores, "PAUSE", 0.01)
    said: list[list[str]] = [[], []]
    threads = [
        threading.Thread(target=run, args=(Store(tmp_path, leader=True), letters, lines))
        for lines in said
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(i for _, i in letters.made) == [*range(6)]
    assert len({name for name, _ in letters.made}) == 2
    # a busy machine may let one of them wait for a moment before it takes part
    heads = [{line.partition(": ")[2].partition(" in ")[0] for line in lines} for lines in said]
    assert any("runs" in head for head in heads) and any("takes part" in head for head in heads)


@dataclass(frozen=True, eq=False)
class OtherParts(Letters):
    """Machines that make other parts of the same stage."""

    def parts(self, inputs: Folders, machine: Machine) -> Sequence[str]:
        return [f"{letter}.txt" for letter in "abcdef"[: machine.batch_size]]


def test_a_run_in_other_batches_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "PAUSE", 0.01)
    stage = type("OtherParts", (OtherParts,), {"made": [], "fails_at": None})()
    said: list[str] = []

    def lead() -> None:
        Store(tmp_path).run([stage], Machine(batch_size=6), Log([].append, "none"))

    thread = threading.Thread(target=lead)
    thread.start()
    wait_for(Store(tmp_path).folders[stage] / "running.json")
    Store(tmp_path).run([stage], Machine(batch_size=5), Log(said.append, "none"))
    thread.join(timeout=30)
    assert said[0] == "[1/1] otherparts: waits for another run that works on the same stage"
    assert len({name for name, _ in stage.made}) == 1


def test_of_a_damaged_split_result_the_sound_parts_stay(letters: Letters, tmp_path: Path) -> None:
    store, said = Store(tmp_path), list[str]()
    folder = run(store, letters)
    before = store.done(letters)
    (folder / "b.txt").write_text("7")
    (folder / "e.txt").unlink()
    letters.made.clear()
    run(store, letters, said)
    assert [i for _, i in letters.made] == [1, 4]
    assert said[0] == f"      {folder / 'b.txt'} is damaged; letters is mended"
    after = store.done(letters)
    assert before is not None and after is not None and after["files"] == before["files"]
    assert not [*folder.glob(".*")]


@dataclass(frozen=True, eq=False)
class Echo(Letters):
    """Copies every letter as soon as it is written."""

    letters: Letters | None = None

    @property
    def follows(self) -> SplitStage | None:
        return self.letters

    def open(
        self, folder: Path, inputs: Folders, machine: Machine, log: Log
    ) -> Callable[[int], None]:
        assert self.letters is not None
        source = inputs[self.letters]

        def make(i: int) -> None:
            self.made.append(("echo", i))
            name = f"{'abcdef'[i]}.txt"
            (folder / name).write_text((source / name).read_text())

        return make


def test_a_stage_that_follows_is_made_part_by_part(letters: Letters, tmp_path: Path) -> None:
    kind = type("Echo", (Echo,), {"made": letters.made, "fails_at": None})
    echo, store = kind(letters), Store(tmp_path)
    type(letters).fails_at = 3
    with pytest.raises(OSError, match="disk is full"):
        store.run([letters, echo], Machine(), Log([].append, "none"))
    who = [name if name == "echo" else "letters" for name, _ in letters.made]
    assert who == ["letters", "echo"] * 3
    type(letters).fails_at = None
    store.run([letters, echo], Machine(), Log([].append, "none"))
    assert [i for name, i in letters.made if name == "echo"] == [*range(6)]
    marker = store.done(echo)
    assert marker is not None and marker["what"] == {"text": "012345"} and marker["busy"] >= 0


def test_stages_may_lie_elsewhere(letters: Letters, tmp_path: Path) -> None:
    """Where a folder is not named by the key, what another stage left there is no result."""
    home = tmp_path / "pictures"
    store = Store(tmp_path / "cache", homes={letters: home})
    assert run(store, letters) == home and store.done(letters) is not None
    other = step()
    assert Store(tmp_path / "cache", homes={other: home}).done(other) is None

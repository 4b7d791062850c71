import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments.store import Stage, Store, is_leader

ROOT = Path(__file__).parents[2]


def run(store: Store, work, said: list[str] | None = None, **options) -> Path:
    said = [] if said is None else said
    return store.run("train", "abc", {"steps": 2}, work, said.append, **options)


def test_runs_once_then_reuses(tmp_path: Path):
    store = Store(tmp_path / "cache", order=("data", "train"))
    said: list[str] = []
    calls: list[Path] = []

    def work(folder: Path) -> dict:
        (folder / "weights").write_text("w")
        calls.append(folder)
        return {"loss": 0.5}

    stage = Stage("train", "abc")
    assert store.done(stage) is None
    folder = run(store, work, said)
    assert folder == store.folder(stage) == tmp_path / "cache" / "train-abc"
    assert run(store, work, said) == folder and calls == [folder]
    marker = store.done(stage)
    assert marker is not None
    assert marker["what"] == {"loss": 0.5} and marker["settings"] == {"steps": 2}
    assert marker["seconds"] >= 0 and marker["stage"] == "train"
    assert said[0] == f"[2/2] train: runs in {folder}"
    assert said[1].startswith("[2/2] train: done in ")
    assert said[2].startswith(f"[2/2] train: reused from {folder}")
    assert sorted(p.name for p in folder.iterdir()) == ["done.json", "weights"]


def test_another_key_is_another_result(tmp_path: Path):
    store = Store(tmp_path)
    one = store.run("train", "a", {}, lambda folder: {}, print)
    two = store.run("train", "b", {}, lambda folder: {}, print)
    assert one != two and store.done(Stage("train", "b")) is not None


def test_interrupted_work_is_not_done_and_goes_on(tmp_path: Path):
    store = Store(tmp_path)
    said: list[str] = []

    def stop(folder: Path) -> dict:
        (folder / "half").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(store, stop, said)
    assert store.done(Stage("train", "abc")) is None

    def finish(folder: Path) -> dict:
        return {"found": (folder / "half").read_text()}

    folder = run(store, finish, said)
    assert json.loads((folder / "done.json").read_text())["what"] == {"found": "1"}
    assert said[1] == f"train: continues in {folder}"


def test_a_broken_marker_is_no_result(tmp_path: Path):
    store = Store(tmp_path)
    folder = run(store, lambda folder: {})
    (folder / "done.json").write_text('{"stage": ')
    assert store.done(Stage("train", "abc")) is None


RACER = """
import os, sys, time
from pathlib import Path
from experiments.store import Store

def work(folder):
    with open(folder / "log", "a") as log:
        log.write(f"{os.getpid()}\\n")
    (folder / "begun").touch()
    if sys.argv[2] == "hang":
        time.sleep(600)
    time.sleep(0.7)
    return {}

Store(sys.argv[1]).run("train", "abc", {}, work, lambda line: print(line, flush=True))
"""


def racer(root: Path, how: str = "finish") -> subprocess.Popen:
    command = [sys.executable, "-c", RACER, str(root), how]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wait_for(path: Path, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_two_processes_work_once(tmp_path: Path):
    first = racer(tmp_path)
    wait_for(tmp_path / "train-abc" / "begun")
    second = racer(tmp_path)
    out = [p.communicate(timeout=60)[0] for p in (first, second)]
    assert first.returncode == second.returncode == 0
    assert len((tmp_path / "train-abc" / "log").read_text().split()) == 1
    assert "done in" in out[0]
    assert "waits for another run" in out[1] and "reused" in out[1] and "done in" not in out[1]


def test_a_killed_process_leaves_no_lock(tmp_path: Path):
    killed = racer(tmp_path, "hang")
    wait_for(tmp_path / "train-abc" / "begun")
    killed.kill()
    killed.wait(timeout=30)
    said: list[str] = []
    folder = run(Store(tmp_path), lambda folder: {}, said)
    assert said[0] == f"train: continues in {folder}" and said[1].startswith("train: done")
    assert not (folder / "running.json").exists()


def test_followers_wait_for_the_leader(tmp_path: Path):
    worked: list[str] = []
    leader, follower = Store(tmp_path, leader=True), Store(tmp_path, leader=False)

    def follow() -> None:
        run(follower, lambda folder: worked.append("follower") or {})

    thread = threading.Thread(target=follow)
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive() and not worked
    run(leader, lambda folder: worked.append("leader") or {})
    thread.join(timeout=10)
    assert not thread.is_alive() and worked == ["leader"]


def test_every_rank_works_once_the_leader_has_begun(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch-7")
    both = threading.Barrier(2, timeout=20)
    worked: list[str] = []
    said: list[str] = []

    def work(name: str):
        def meet(folder: Path) -> dict:
            both.wait()
            worked.append(name)
            return {}

        return meet

    follower = threading.Thread(
        target=lambda: run(Store(tmp_path, leader=False), work("f"), said, everyone=True)
    )
    follower.start()
    run(Store(tmp_path, leader=True), work("l"), everyone=True)
    follower.join(timeout=10)
    assert sorted(worked) == ["f", "l"] and said == []


def test_a_mark_of_a_dead_launch_starts_nobody(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch-8")
    folder = tmp_path / "train-abc"
    folder.mkdir()
    (folder / "running.json").write_text(json.dumps({"pid": 1_000_000, "launch": "launch-7"}))
    store = Store(tmp_path, leader=False)
    assert not store._begun_by_my_leader(Stage("train", "abc"))
    (folder / "running.json").write_text(json.dumps({"pid": os.getppid(), "launch": ""}))
    assert store._begun_by_my_leader(Stage("train", "abc"))


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_rank_0_leads(name: str, monkeypatch):
    assert is_leader()
    monkeypatch.setenv(name, "0")
    assert is_leader()
    monkeypatch.setenv(name, "1")
    assert not is_leader()

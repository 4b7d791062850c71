"""Stages in parts: however many processes made them, and however they ended, the bytes agree."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from experiments.papers.registry import load
from experiments.pipeline.encode import Encode
from experiments.pipeline.features import Features
from experiments.pipeline.plan import Plan, plan
from experiments.pipeline.sample import Sample
from experiments.pipeline.score import Score
from experiments.pipeline.stage import Log, SplitStage, Stage
from experiments.pipeline.store import Store

pytestmark = pytest.mark.bits
SPLIT = (Encode, Sample, Features)
# processes are forks of one that has imported torch and run nothing
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "experiments.pipeline.plan",
        "experiments.papers.registry",
        "eval.scorers",
        "data.webdata",
        "lightning_modules.registry",
        "data.tokens",
        "eval.classifier_network",
    ]
)
# three shards to encode, six batches to sample and twelve of a reference; the last ones not full
WORDS = [
    "data.train_size=600",
    "eval.batch_size=3",
    "trainer.max_steps=1",
    "logger=csv",
    "tokenizer.trainer.max_steps=1",
    "superres_trainer.max_steps=1",
]


def planned(paper: str, cache: Path) -> tuple[Plan, Any]:
    words = [w for w in WORDS if paper == "muse" or not w.startswith("superres")]
    run = load(paper, "micro", [*words, f"cache={cache}"])
    return plan(paper, run), run.machine()


def work(paper: str, cache: Path, rank: int, world: int, killed: str, launch: str) -> None:
    """Do a run as one of several processes, as torchrun starts them; the body of a process."""
    import torch

    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ["TORCHELASTIC_RUN_ID"] = launch
    for cls in SPLIT:
        cls.open = watched(cls.open, cache / f"made-{rank}", killed == cls.__name__)  # type: ignore[method-assign]
    if killed == "Sample":  # with the pictures of a batch written, and not the batch's own file
        from experiments.pipeline import sample

        sample.atomic = halfway(sample.atomic)  # type: ignore[assignment]
    stages, machine = planned(paper, cache)
    Store(cache).run(stages.stages, machine, Log(lambda line: None, "none"))


def watched(open_: Callable, made: Path, killed: bool) -> Callable:
    """Let a stage note the parts that it makes, and end at its third part if it is to be killed."""

    def opened(self: SplitStage, folder: Path, inputs: Any, machine: Any, log: Any) -> Callable:
        make, count = open_(self, folder, inputs, machine, log), 0
        names = self.parts(inputs, machine)

        def one(i: int) -> None:
            nonlocal count
            count += 1
            if killed and not isinstance(self, Sample) and count == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.03)  # so that one process does not take all before another is there
            make(i)
            with made.open("a") as file:
                file.write(f"{folder.name}/{names[i]}\n")

        return one

    return opened


def halfway(atomic: Callable) -> Callable:
    count = 0

    def killing(path: Path) -> Any:
        nonlocal count
        count += path.name.startswith("batch")
        if count == 3:
            (path.parent / f".{path.name}.{os.getpid()}.tmp").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return atomic(path)

    return killing


def processes(paper: str, cache: Path, world: int, killed: str = "") -> list[int]:
    """Run in so many processes; returns their exit codes."""
    launch = f"{cache}-{time.monotonic()}"
    started = [
        FORKS.Process(target=work, args=(paper, cache, rank, world, killed, launch))
        for rank in range(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(240)
    codes = [process.exitcode for process in started]
    for process in started:
        if process.exitcode is None:
            process.kill()
    return [-1 if code is None else code for code in codes]


def made(cache: Path) -> list[list[str]]:
    """The parts that each process made."""
    return [path.read_text().split() for path in sorted(cache.glob("made-*"))]


def wholes(paper: str, cache: Path) -> list[Stage]:
    return [s for s in planned(paper, cache)[0].stages if isinstance(s, (*SPLIT, Score))]


def left(paper: str, cache: Path) -> dict[str, bytes]:
    """Every file of the stages in parts, and of the scores; locks are the system's."""
    found = {}
    for stage in wholes(paper, cache):
        folder = cache / stage.folder
        for path in sorted(p for p in folder.rglob("*") if p.suffix != ".lock"):
            if path.name != "done.json":  # it says when
                found[str(path.relative_to(cache))] = path.read_bytes()
    return found


@dataclass
class Whole:
    """What one process made in one go."""

    paper: str
    cache: Path
    files: dict[str, bytes]

    def without_parts(self, root: Path) -> Path:
        """A store of its own in which everything but the stages in parts is done."""
        dropped = [stage.folder for stage in wholes(self.paper, self.cache)]
        ignore = shutil.ignore_patterns("made-*", ".*.lock", *dropped)
        return Path(shutil.copytree(self.cache, root / "cache", ignore=ignore))


@pytest.fixture(scope="module", params=["paella", "muse"])
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Whole]:
    cache = tmp_path_factory.mktemp(request.param) / "cache"
    cache.mkdir()
    assert processes(request.param, cache, 1) == [0]
    yield Whole(request.param, cache, left(request.param, cache))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_parts(whole: Whole, world: int, tmp_path: Path) -> None:
    cache = whole.without_parts(tmp_path)
    assert processes(whole.paper, cache, world) == [0] * world
    assert left(whole.paper, cache) == whole.files
    shares = made(cache)
    assert len(shares) == world  # each made some
    parts = [part for share in shares for part in share]
    assert sorted(parts) == sorted(made(whole.cache)[0])  # and each part was made once


def test_a_killed_run_goes_on_with_its_parts(whole: Whole, tmp_path: Path) -> None:
    cache = whole.without_parts(tmp_path)
    for killed in ("Encode", "Sample", "Features"):
        assert processes(whole.paper, cache, 1, killed) == [-signal.SIGKILL]
    assert processes(whole.paper, cache, 1) == [0]
    assert left(whole.paper, cache) == whole.files
    parts = made(cache)[0]
    assert len(parts) == len(set(parts)) and set(parts) == set(made(whole.cache)[0])


def test_a_damaged_picture_is_drawn_again(whole: Whole, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(whole.cache, tmp_path / "cache"))
    sample = next(s for s in wholes(whole.paper, cache) if isinstance(s, Sample))
    picture = cache / sample.folder / "00004.png"
    picture.write_bytes(b"no picture")
    for stage in wholes(whole.paper, cache):
        if isinstance(stage, (Features, Score)):
            shutil.rmtree(cache / stage.folder)
    assert processes(whole.paper, cache, 1) == [0]
    assert left(whole.paper, cache) == whole.files
    assert json.loads((cache / sample.folder / "done.json").read_text())["files"]["00004.png"]

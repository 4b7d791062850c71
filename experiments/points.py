"""The points of a sweep in work: each is done by one process of any number that share a folder."""

import json
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from data.files import write_json, write_text
from experiments.cli import RUN, first_line
from experiments.grid import Sweep, SweepRun, finished
from experiments.pipeline.generator import Generator
from experiments.pipeline.store import Store
from experiments.progress import Board, clock
from experiments.report.scores import notation
from experiments.settings import UserError

Say = Callable[[str], None]
PAUSE = 0.5  # seconds between two looks at what others do
FAILED = "failed.json"


def do_runs(sweep: Sweep, runs: Sequence[SweepRun], say: Say, only: int | None = None) -> None:
    """Do every run that is not finished; one that fails is noted, and the next begins.

    A run that another process is at, or whose training another process is at, is left to later, so
    that a training is waited for and not repeated.

    Args:
        sweep: whose runs.
        runs: all of them; they receive their scores.
        say: gets one line per event.
        only: number of the run to do; None does all.
    """
    waiting = [n for n in range(len(runs)) if only in (None, n)]
    told: set[int] = set()
    last: float | None = None
    while waiting:
        before = len(waiting)
        for n in list(waiting):
            run = runs[n]
            head = f"[{n + 1}/{len(runs)}] {sweep.name}: {run.label}".rstrip(": ")
            if finished(run):
                say(f"{head}: finished, in {run.out}")
                waiting.remove(n)
                continue
            with claimed(run) as mine:
                if not mine:
                    if n not in told:
                        say(f"{head}: another process is at it or at its training")
                        told.add(n)
                    continue
                # as the one before; the first of a sweep often trains what the others share
                left = f" (about {clock(last * len(waiting))} left in all)" if last else ""
                say(f"{head}{left}")
                waiting.remove(n)
                begun = time.monotonic()
                if do_run(run, say):
                    last = time.monotonic() - begun
                    if score := score_of(sweep, run):
                        say(f"    {score}")
        if len(waiting) == before:
            time.sleep(PAUSE)


def score_of(sweep: Sweep, run: SweepRun) -> str:
    """Write the sought score of a run that is done; empty where it has none."""
    with suppress(OSError, ValueError):
        score = json.loads((run.out / "metrics.json").read_text()).get(sweep.metric)
        if score is not None:
            return f"{sweep.metric} {notation(score)}"
    return ""


def do_run(run: SweepRun, say: Say) -> bool:
    """Do one run; what stops it is noted in its folder. Returns whether it was done."""
    from experiments.pipeline.publish import Titles
    from experiments.pipeline.runner import execute

    (run.out / FAILED).unlink(missing_ok=True)
    titles = Titles(run.paper, run.scale, shlex.join([*RUN.split(), *run.argv]))
    try:
        execute(
            titles,
            run.config,
            run.out,
            lambda line: None if " reused from " in line else say(f"    {line}"),
        )
        return True
    except Exception as error:  # whatever it is, the other runs are not to blame
        known = isinstance(error, UserError)
        why = str(error) if known else f"{type(error).__name__}: {first_line(error)}"
        say(f"    failed: {why}")
        with suppress(OSError):  # a folder that cannot be written may be what failed
            write_json(run.out / FAILED, {"error": why})
            if not known:
                write_text(run.out / "error.txt", traceback.format_exc())
                say(f"    the traceback is in {run.out / 'error.txt'}")
        run.error = why
        return False


def collect(runs: Sequence[SweepRun]) -> None:
    """Read the scores of runs and what they cost from the store, and why others failed.

    Results are known by their content: whoever made them, a sweep with an --out of its own, an
    agent or a single run, they are found in the cache that the settings name.
    """
    for run in runs:
        if not finished(run):
            with suppress(OSError, ValueError):
                run.error = json.loads((run.out / FAILED).read_text())["error"]
        store = Store(run.config.cache)
        if store.done(run.plan.score) is None:
            continue
        with suppress(OSError):  # a score without any leaves none
            run.scores = {**run.plan.score.scores(store.folders), **costs(run, store)}
            for prefix in run.plan.samples:
                verdicts = run.plan.score.verdicts(store.folders, prefix)
                run.right[prefix] = {
                    (place,): v["right"] for place, v in verdicts.items() if "right" in v
                }


def costs(run: SweepRun, store: Store) -> dict[str, dict[str, Any]]:
    """Return what the pictures of a run cost besides network calls, under the names of scores.

    PREFIX/seconds: to draw, decode and write a picture, in batches of eval.batch_size on the
    machine that drew it. PREFIX/parameters: trained for it, the text encoder's among them.
    """
    found: dict[str, dict[str, Any]] = {}
    for prefix, sample in run.plan.samples.items():
        drawn = store.done(sample)
        if drawn is not None:
            n = drawn["what"]["pictures"]
            found[f"{prefix}/seconds"] = {"value": drawn["busy"] / n, "n": n}
        generator = sample.generator
        stages = generator.trainings(sample.part) if isinstance(generator, Generator) else []
        trained = [marker for stage in stages if (marker := store.done(stage))]
        if stages and len(trained) == len(stages):
            count = sum(marker["what"]["parameters"] for marker in trained)
            found[f"{prefix}/parameters"] = {"value": count}
    return found


@contextmanager
def claimed(run: SweepRun) -> Iterator[bool]:
    """Hold a run and its trainings against other processes; gives False where another has one.

    The locks are the operating system's: those of a killed process are free.
    """
    store = Store(run.config.cache)
    trainings = [stage for stage in run.plan.trainings if store.done(stage) is None]
    names = [run.out.parent / ".locks" / run.out.name]
    names += [store.root / f".{stage.folder}.sweep.lock" for stage in trainings]
    with ExitStack() as held:
        try:
            for name in names:
                name.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(name).acquire(timeout=0))
        except Timeout:
            yield False
            return
        yield True


def supervise(
    sweep: Sweep,
    runs: Sequence[SweepRun],
    argv: Sequence[str],
    jobs: int,
    say: Say,
    screen: Console | None = None,
) -> None:
    """Let `jobs` processes do the runs, and show what is done and how long the rest will take.

    Args:
        sweep: whose runs.
        runs: all of them.
        argv: words of the sweep command for each process.
        jobs: number of processes; they share the processors.
        say: gets one line per event, where there is no screen.
        screen: a terminal for a live table.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    for run in runs:
        (run.out / FAILED).unlink(missing_ok=True)
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "experiments.sweep", *argv],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        for _ in range(jobs)
    ]
    said = [finished(run) for run in runs]
    try:
        with Board(sweep.name, len(runs), sum(said), say, screen) as board:
            while True:
                running = any(worker.poll() is None for worker in workers)
                for n, run in enumerate(runs):
                    failed = (run.out / FAILED).exists()
                    if said[n] or not (failed or finished(run)):
                        continue
                    said[n] = True
                    score = "" if failed else score_of(sweep, run)
                    board.add(run.label, "failed" if failed else "done", score)
                if not running:
                    break
                time.sleep(PAUSE)
    finally:
        for worker in workers:
            worker.terminate()
            worker.wait()
    for n, run in enumerate(runs):
        if not said[n]:
            run.error = "the process that did it ended; the same command does it again"

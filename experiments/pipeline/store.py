"""The store: one folder per stage and key, locked while in work, marked when done.

Who works. The leader (rank 0) does the stages of RANKS `leader` and marks all; the other ranks
wait for the marker, or take part as soon as their leader has begun: of `all` in one training,
of `split` by claiming parts that nobody has claimed.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data.files import file_hash, write_json
from experiments.pipeline.ranks import is_leader, launch
from experiments.pipeline.stage import FileStage, Folders, Log, Machine, SplitStage, Stage

PAUSE = 0.2  # seconds between two looks at what others do


class Store:
    """Stage folders `root/<name>-<key>/`; a result stands once `done.json` is in its folder.

    Args:
        root: the folder of all stage folders; nothing is written before the first stage runs.
        leader: whether this process decides; default: rank 0 does.
    """

    def __init__(self, root: Path | str, leader: bool | None = None) -> None:
        self.root = Path(root)
        self.folders = Folders(self.root)
        self.leader = is_leader() if leader is None else leader

    def done(self, stage: Stage) -> dict[str, Any] | None:
        """Read the marker of a finished stage; None where the result does not stand."""
        try:
            marker = json.loads((self.folders[stage] / "done.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        whole = isinstance(marker, dict) and marker.pop("sum", None) == _sum(marker)
        return marker if whole else None

    def damaged(self, stage: Stage, marker: dict[str, Any]) -> str | None:
        """Return the first file of a finished stage whose bytes are not those that it wrote."""
        for name, (size, sha256) in marker["files"].items():
            path = self.folders[stage] / name
            if not path.is_file() or path.stat().st_size != size or file_hash(path) != sha256:
                return str(path)
        return None

    def run(
        self, stages: Sequence[Stage], machine: Machine, log: Log, read: Sequence[Stage] = ()
    ) -> set[Stage]:
        """Make the results of stages, in order, where they do not stand.

        A stage that was interrupted keeps its folder, and goes on with what it finds there.

        Args:
            stages: what is needed first comes first.
            machine: where and how they work.
            log: gets one line per event.
            read: stages whose results are read afterwards; without any, the last one.

        Returns:
            Those that were reused.

        Raises:
            SystemExit: the leader of this launch ended before a stage was done.
        """
        reused: set[Stage] = set()
        damaged = self._find_damaged(stages, read)
        if self.leader:
            self._drop(damaged, log)
        for number, stage in enumerate(stages, 1):
            head = f"[{number}/{len(stages)}] {stage.name}"
            if not self.leader:
                if self._follow(stage, damaged.get(stage)):
                    self._work(stage, machine, log)
            elif self._reuse(stage, head, log):
                reused.add(stage)
            else:
                self._lead(stage, head, machine, log)
        return reused

    def remember(self, out: Path, stages: Sequence[Stage]) -> None:
        """Note which stages the run in the folder `out` was made of, for `experiments.store`."""
        place = os.path.abspath(out)
        name = hashlib.sha256(place.encode()).hexdigest()[:16]
        folders = [stage.folder for stage in stages]
        write_json(self.root / "runs" / f"{name}.json", {"out": place, "stages": folders})

    def _find_damaged(
        self, stages: Sequence[Stage], read: Sequence[Stage]
    ) -> dict[Stage, tuple[str, dict[str, Any]]]:
        """Find results that will be read and are not what was written: first such file, and marker.

        Looked at are `read` and the inputs of stages that will work, with what they lean on: what
        nobody reads costs nothing.
        """
        found: dict[Stage, tuple[str, dict[str, Any]]] = {}
        needed = {*_leaning(read or stages[-1:])}
        for stage in reversed(stages):  # those that need others come after them
            marker = self.done(stage)
            file = self.damaged(stage, marker) if marker and stage in needed else None
            if marker and file:
                found[stage] = (file, marker)
            if marker is None or file:
                needed |= {*_leaning(stage.inputs)}
        return found

    def _drop(self, damaged: dict[Stage, tuple[str, dict[str, Any]]], log: Log) -> None:
        """Take the marks off damaged results."""
        for stage, (file, _) in damaged.items():
            log.note(f"{file} is damaged; {stage.name} is done again")
            (self.folders[stage] / "done.json").unlink(missing_ok=True)
            Path(file).unlink(missing_ok=True)
            if isinstance(stage, SplitStage):  # whichever part the file was of
                shutil.rmtree(self.folders[stage])

    def _lead(self, stage: Stage, head: str, machine: Machine, log: Log) -> None:
        folder = self.folders[stage]
        with self.locked(stage, head, log):
            if self._reuse(stage, head, log):  # another run finished it while this one waited
                return
            log.say(f"{head}: {'continues' if folder.exists() else 'runs'} in {folder}")
            folder.mkdir(parents=True, exist_ok=True)
            begun = time.monotonic()
            write_json(folder / "running.json", {"pid": os.getpid(), "launch": launch()})
            try:
                what = self._work(stage, machine, log)
            finally:
                (folder / "running.json").unlink(missing_ok=True)
            seconds = round(time.monotonic() - begun, 2)
            when = datetime.now(UTC).isoformat(timespec="seconds")
            marker = {"name": stage.name, "key": stage.key, "seconds": seconds, "when": when}
            marker |= {"what": what, "files": written(folder), "fields": stage.content}
            write_json(folder / "done.json", {**marker, "sum": _sum(marker)})
            # after the mark, by which a rank that is late knows that no part is missing: locks and
            # sums of parts, and what a kill left half written
            for left in [p for kind in ("lock", "sum", "tmp") for p in folder.glob(f".*.{kind}")]:
                left.unlink(missing_ok=True)
            log.say(f"{head}: done in {duration(seconds)}")

    def _work(self, stage: Stage, machine: Machine, log: Log) -> dict[str, Any]:
        folder = self.folders[stage]
        if not isinstance(stage, SplitStage):
            return stage.run(folder, self.folders, machine, log)
        self._share(stage, machine, log)
        return stage.finish(folder, self.folders, machine, log) if self.leader else {}

    def _share(self, stage: SplitStage, machine: Machine, log: Log) -> None:
        """Make the parts that nobody else makes; the leader leaves when all are done."""
        folder = self.folders[stage]
        names = stage.parts(self.folders, machine)
        missing = [i for i, name in enumerate(names) if not _whole(folder, name)]
        for i in missing if self.leader else []:
            if (folder / names[i]).exists() and (folder / f".{names[i]}.sum").exists():
                log.note(f"{folder / names[i]} or a file beside it is damaged; it is made again")
        counter = log.counter(stage.name, len(names), len(names) - len(missing))
        make = stage.open(folder, self.folders, machine, log) if missing else None
        try:
            while missing and make is not None:
                made = 0
                for i in missing:
                    if _whole(folder, names[i]):
                        continue
                    # the lock belongs to the operating system, so that of a killed process is free
                    lock = FileLock(folder / f".{names[i]}.lock")
                    with suppress(Timeout), lock.acquire(timeout=0):
                        if not _whole(folder, names[i]) and self.done(stage) is None:
                            make(i)
                            files = [*stage.beside(i, self.folders, machine), names[i]]
                            sums = {name: file_hash(folder / name) for name in files}
                            write_json(folder / f".{names[i]}.sum", sums)
                            made += 1
                            counter.update(counter.done + 1)
                if not self.leader:
                    break
                missing = [i for i in missing if not _whole(folder, names[i])]
                if missing and not made:
                    time.sleep(PAUSE)
        finally:
            counter.close()

    @contextmanager
    def locked(self, stage: Stage, head: str, log: Log) -> Iterator[None]:
        """Hold the stage's lock; another run that asks for it says that it waits."""
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / f".{stage.folder}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.say(f"{head}: waits for another run that works on the same stage")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _reuse(self, stage: Stage, head: str, log: Log) -> bool:
        marker = self.done(stage)
        if marker is not None:
            log.say(f"{head}: reused from {self.folders[stage]} ({marker['when']})")
        return marker is not None

    def _follow(self, stage: Stage, damaged: tuple[str, dict[str, Any]] | None = None) -> bool:
        """Wait as a follower; True when the leader began work in which every rank takes part."""
        parent = os.getppid()
        stale = None if damaged is None else damaged[1]  # a mark that the leader will take off
        while self.done(stage) in (None, stale):
            if stage.RANKS != "leader" and self._begun_by_my_leader(stage):
                return True
            if os.getppid() != parent:
                raise SystemExit(1)  # rank 0 ended, and said why
            time.sleep(PAUSE)
        return False

    def _begun_by_my_leader(self, stage: Stage) -> bool:
        """Tell the leader's mark from one that a killed launch left behind."""
        try:
            mark = json.loads((self.folders[stage] / "running.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        # Lightning's own launcher starts the followers as children of the leader, in the middle of
        # its work; torchrun and Slurm start all ranks alike, with one launch id in the environment
        return mark["pid"] == os.getppid() or (bool(launch()) and mark["launch"] == launch())


def _sum(marker: dict[str, Any]) -> str:
    """Return the sha256 of a marker's content, so that damage does not pass for a result."""
    plain = json.loads(json.dumps(marker))  # as it is read again
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _leaning(stages: Iterable[Stage]) -> Iterator[Stage]:
    """List stages and what is read with them: pictures lean on captions, weights on nothing."""
    for stage in stages:
        yield stage
        if not isinstance(stage, FileStage):
            yield from _leaning(stage.inputs)


def _whole(folder: Path, name: str) -> bool:
    """Say whether the files of a part, whose last one has this name, are as they were written."""
    try:
        sums = json.loads((folder / f".{name}.sum").read_text())
        return name in sums and all(file_hash(folder / f) == sums[f] for f in sums)
    except (OSError, ValueError, TypeError):  # not there, no JSON, no mapping
        return False


def written(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and sha256 of the files that a stage left, by their names in its folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    kept = [p for p in files if p.name not in ("running.json", "done.json", "resume.ckpt")]
    return {str(p.relative_to(folder)): (p.stat().st_size, file_hash(p)) for p in kept}


def duration(seconds: float) -> str:
    """Return seconds, or minutes and hours, in words."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"

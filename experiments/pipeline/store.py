"""The store: one folder per stage and key, locked while in work, marked when done.

Who works. The leader (rank 0) does the stages of RANKS `leader` and marks all; the other ranks
wait for the marker, or take part as soon as their leader has begun: of `all` in one training,
of `split` by claiming parts that nobody has claimed. Leaders of several runs, such as the tasks of
an array of Slurm, share the parts of a `split` stage as well; the first that finds all done
finishes it.
"""

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data.files import file_hash, write_json
from experiments.pipeline.ranks import is_leader, launch
from experiments.pipeline.stage import FileStage, Folders, Log, Machine, SplitStage, Stage

PAUSE = 0.2  # seconds between two looks at what others do
RUNNING = "running"  # begins the name of a leader's mark


class Store:
    """Stage folders `root/<name>-<key>/`; a result stands once `done.json` is in its folder.

    Args:
        root: the folder of all stage folders; nothing is written before the first stage runs.
        leader: whether this process decides; default: rank 0 does.
        homes: stages whose folder is another one, which may hold what other settings left there.
    """

    def __init__(
        self,
        root: Path | str,
        leader: bool | None = None,
        homes: Mapping[Stage, Path] | None = None,
    ) -> None:
        self.root = Path(root)
        self.folders = Folders(self.root, homes)
        self.leader = is_leader() if leader is None else leader

    def done(self, stage: Stage) -> dict[str, Any] | None:
        """Read the marker of a finished stage; None where the result does not stand."""
        try:
            marker = json.loads((self.folders[stage] / "done.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        whole = isinstance(marker, dict) and marker.pop("sum", None) == _sum(marker)
        return marker if whole and marker["key"] == stage.key else None

    def damaged(self, stage: Stage, marker: dict[str, Any]) -> str | None:
        """Return the first file of a finished stage whose bytes are not those that it wrote."""
        for name, told in marker["files"].items():
            path = self.folders[stage] / name
            if not _as_written(path, *told):
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

    def _lead(self, stage: Stage, head: str, machine: Machine, log: Log) -> None:
        folder = self.folders[stage]
        begun = time.monotonic()
        if isinstance(
            stage, SplitStage
        ):  # before the lock: whoever else leads such a run takes part
            self._begin(stage, head, log)
            with self._running(folder):
                self._share(stage, machine, log)
        with self.locked(stage, head, log):
            if self._reuse(stage, head, log):  # another run finished it while this one waited
                return
            if not isinstance(stage, SplitStage):
                self._begin(stage, head, log)
            with self._running(folder):
                what = self._result(stage, machine, log)
            seconds = round(time.monotonic() - begun, 2)
            when = datetime.now(UTC).isoformat(timespec="seconds")
            marker = {"name": stage.name, "key": stage.key, "seconds": seconds, "when": when}
            marker |= {"what": what, "files": written(folder), "fields": stage.content}
            write_json(folder / "done.json", {**marker, "sum": _sum(marker)})
            # after the mark, by which a rank that is late knows that no part is missing: locks and
            # sums of parts, and what a kill left half written
            kinds = (".*.lock", ".*.sum", ".*.tmp", f"{RUNNING}-*.json")
            for left in [path for kind in kinds for path in folder.glob(kind)]:
                if not left.name.startswith(f".{RUNNING}-"):  # one that a leader writes just now
                    left.unlink(missing_ok=True)
            log.say(f"{head}: done in {duration(seconds)}")

    def _begin(self, stage: Stage, head: str, log: Log) -> None:
        folder = self.folders[stage]
        log.say(f"{head}: {'continues' if folder.exists() else 'runs'} in {folder}")
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def _running(self, folder: Path) -> Iterator[None]:
        """Mark that this leader is at work, for the other ranks of its launch."""
        mark = folder / f"{RUNNING}-{socket.gethostname()}-{os.getpid()}.json"
        write_json(mark, {"pid": os.getpid(), "launch": launch()})
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)

    def _result(self, stage: Stage, machine: Machine, log: Log) -> dict[str, Any]:
        if isinstance(stage, SplitStage):
            return self._finish(stage, machine, log)
        return stage.run(self.folders[stage], self.folders, machine, log)

    def _work(self, stage: Stage, machine: Machine, log: Log) -> None:
        """Take part as a follower."""
        if isinstance(stage, SplitStage):
            self._share(stage, machine, log)
        else:
            stage.run(self.folders[stage], self.folders, machine, log)

    def _finish(self, stage: SplitStage, machine: Machine, log: Log) -> dict[str, Any]:
        """Close a stage whose parts are all made; one that was damaged since is made again."""
        folder = self.folders[stage]
        while damaged := [
            name
            for name in stage.parts(self.folders, machine)
            if not _whole(folder, name, read=True)
        ]:
            for name in damaged:
                log.note(f"{folder / name} or a file beside it is damaged; it is made again")
                (folder / f".{name}.sum").unlink(missing_ok=True)
            self._share(stage, machine, log)
        return stage.finish(folder, self.folders, machine, log)

    def _share(self, stage: SplitStage, machine: Machine, log: Log) -> None:
        """Make the parts that nobody else makes; a leader leaves when all are done.

        Raises:
            ValueError: parts that failed, where the others do not depend on them.
        """
        folder = self.folders[stage]
        names = stage.parts(self.folders, machine)
        missing = [i for i, name in enumerate(names) if not _whole(folder, name)]
        counter = log.counter(stage.name, len(names), len(names) - len(missing))
        make = stage.open(folder, self.folders, machine, log) if missing else None
        failed: dict[int, ValueError] = {}
        try:
            while missing and make is not None and self.done(stage) is None:
                tried = 0
                for i in missing:
                    if _whole(folder, names[i]):
                        continue
                    # the lock belongs to the operating system, so that of a killed process is free
                    lock = FileLock(folder / f".{names[i]}.lock")
                    with suppress(Timeout), lock.acquire(timeout=0):
                        if not _whole(folder, names[i]) and self.done(stage) is None:
                            tried += 1
                            try:
                                make(i)
                            except ValueError as error:
                                if not stage.APART:
                                    raise
                                failed[i] = error
                                log.note(f"{names[i]} failed: {error}")
                                continue
                            files = [*stage.beside(i, self.folders, machine), names[i]]
                            write_json(folder / f".{names[i]}.sum", _sums(folder, files))
                            counter.update(counter.done + 1)
                if not self.leader:
                    break
                left = (i for i in missing if i not in failed)
                missing = [i for i in left if not _whole(folder, names[i])]
                if missing and not tried:
                    time.sleep(PAUSE)
        finally:
            counter.close()
        if failed:
            told = ", ".join(names[i] for i in failed)
            raise ValueError(
                f"{len(failed)} of {len(names)} parts of {stage.name} failed: {told} (first: "
                f"{next(iter(failed.values()))}); the others are kept, and once this is put right "
                "the same command makes what is missing"
            )

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
        # Lightning's own launcher starts the followers as children of the leader, in the middle of
        # its work; torchrun and Slurm start all ranks alike, with one launch id in the environment
        for path in self.folders[stage].glob(f"{RUNNING}-*.json"):
            with suppress(FileNotFoundError, json.JSONDecodeError):
                mark = json.loads(path.read_text())
                if mark["pid"] == os.getppid() or (launch() and mark["launch"] == launch()):
                    return True
        return False


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


def _whole(folder: Path, name: str, read: bool = False) -> bool:
    """Say whether the files of a part, whose last one has this name, are as they were written.

    By their sizes, and with `read` by every byte.
    """
    try:
        sums = json.loads((folder / f".{name}.sum").read_text())
        return name in sums and all(
            _as_written(folder / f, size, sha256 if read else None)
            for f, (size, sha256) in sums.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):  # not there, no JSON, no mapping
        return False


def _as_written(path: Path, size: int, sha256: str | None) -> bool:
    """Say whether a file has this size, and this hash where one is given."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    return sha256 is None or file_hash(path) == sha256


def _sums(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Return size and sha256 of files of a folder."""
    return {n: ((folder / n).stat().st_size, file_hash(folder / n)) for n in names}


def written(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and sha256 of the files that a stage left, by their names in its folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    unkept = ("done.json", "resume.ckpt")
    kept = [p for p in files if p.name not in unkept and not p.name.startswith(f"{RUNNING}-")]
    return _sums(folder, [str(p.relative_to(folder)) for p in kept])


def duration(seconds: float) -> str:
    """Return seconds, or minutes and hours, in words."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"

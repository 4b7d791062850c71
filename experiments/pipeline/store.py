"""The store: one folder per stage and key, locked while in work, marked when done.

Who works. The leader (rank 0) does the stages of RANKS `leader` and marks all; the other ranks
wait for the marker, or take part as soon as their leader has begun: of `all` in one training,
of `split` by claiming parts that nobody has claimed. So does any other run, a task of an array
say, that finds the stage in work.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

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
        homes: folders of stages that lie elsewhere.
        apart: their marks, which say when they were done, stand in `root` and not in them, so that
            equal work leaves equal folders.
    """

    def __init__(
        self,
        root: Path | str,
        leader: bool | None = None,
        homes: Mapping[Stage, Path] | None = None,
        apart: bool = False,
    ) -> None:
        self.root = Path(root)
        self.folders = Folders(self.root, homes)
        self.leader = is_leader() if leader is None else leader
        self.apart = apart

    def mark(self, stage: Stage) -> Path:
        """Return the file that says that a stage is done."""
        folder = self.folders[stage]
        if not self.apart or stage not in self.folders.homes:
            return folder / "done.json"
        where = hashlib.sha256(os.path.abspath(folder).encode()).hexdigest()[:12]
        return self.root / f"{stage.folder}-in-{where}.json"

    def done(self, stage: Stage) -> dict[str, Any] | None:
        """Read the marker of a finished stage; None where the result does not stand."""
        try:
            marker = json.loads(self.mark(stage).read_text())
        except (FileNotFoundError, ValueError):
            return None
        whole = isinstance(marker, dict) and marker.pop("sum", None) == _sum(marker)
        return marker if whole and marker["key"] == stage.key else None

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
            self._drop(damaged, machine, log)
        for number, stage in enumerate(stages, 1):
            head = f"[{number}/{len(stages)}] {stage.name}"
            if not self.leader:
                if self._follow(stage, machine, damaged.get(stage)):
                    self._work(stage, machine, log, stages)
            elif self._reuse(stage, head, log):
                reused.add(stage)
            else:
                self._lead(stage, head, machine, log, stages)
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

    def _drop(
        self, damaged: dict[Stage, tuple[str, dict[str, Any]]], machine: Machine, log: Log
    ) -> None:
        """Take the marks off damaged results; of a split one the sound parts stay."""
        for stage, (file, marker) in damaged.items():
            again = "is done again" if stage.RANKS != "split" else "is mended"
            log.note(f"{file} is damaged; {stage.name} {again}")
            files = [Path(file)]
            if isinstance(stage, SplitStage) and not self._keep_parts(stage, marker, machine):
                files = [self.folders[stage] / name for name in marker["files"]]
            for path in [self.mark(stage), *files]:
                path.unlink(missing_ok=True)

    def _keep_parts(self, stage: SplitStage, marker: dict[str, Any], machine: Machine) -> bool:
        """Note again what every part of a finished result wrote; False where it had others."""
        try:
            parts = stage.parts(self.folders, machine)
            files = [[*stage.beside(i, self.folders, machine), p] for i, p in enumerate(parts)]
            sums = [{name: marker["files"][name][1] for name in part} for part in files]
        except (OSError, KeyError, ValueError):  # made in batches of another size, or its input is
            return False  # damaged, too
        for name, part in zip(parts, sums, strict=True):
            _Noted(stage.key, part, marker["busy"] / len(parts)).write(self.folders[stage], name)
        return True

    def _lead(
        self, stage: Stage, head: str, machine: Machine, log: Log, stages: Sequence[Stage]
    ) -> None:
        folder = self.folders[stage]
        with self.locked(stage, head, machine, log, stages):
            if self._reuse(stage, head, log):  # another run finished it while this one waited
                return
            log.say(f"{head}: {'continues' if folder.exists() else 'runs'} in {folder}")
            folder.mkdir(parents=True, exist_ok=True)
            begun = time.monotonic()
            mark = {"pid": os.getpid(), "launch": launch(), "parts": self._parts(stage, machine)}
            write_json(folder / "running.json", mark)
            try:
                what = self._work(stage, machine, log, stages)
            finally:
                (folder / "running.json").unlink(missing_ok=True)
            seconds = round(time.monotonic() - begun, 2)
            when = datetime.now(UTC).isoformat(timespec="seconds")
            marker = {"name": stage.name, "key": stage.key, "seconds": seconds, "when": when}
            if isinstance(stage, SplitStage):
                parts = stage.parts(self.folders, machine)
                marker["busy"] = round(sum(_Noted.of(folder, name).seconds for name in parts), 2)
            marker |= {"what": what, "files": written(folder), "fields": stage.content}
            write_json(self.mark(stage), {**marker, "sum": _sum(marker)})
            # after the mark, by which a rank that is late knows that no part is missing: locks and
            # sums of parts, and what a kill left half written
            for left in [p for kind in ("lock", "sum", "tmp") for p in folder.glob(f".*.{kind}")]:
                left.unlink(missing_ok=True)
            log.say(f"{head}: done in {duration(seconds)}")

    def _work(
        self, stage: Stage, machine: Machine, log: Log, stages: Sequence[Stage]
    ) -> dict[str, Any]:
        folder = self.folders[stage]
        if not isinstance(stage, SplitStage):
            return stage.run(folder, self.folders, machine, log)
        self._share(stage, machine, log, stages, self.leader)
        return stage.finish(folder, self.folders, machine, log) if self.leader else {}

    def _share(
        self,
        stage: SplitStage,
        machine: Machine,
        log: Log,
        stages: Sequence[Stage],
        lead: bool,
    ) -> None:
        """Make the parts that nobody else makes; who leads leaves when all are done.

        Raises:
            ValueError: parts that failed, of a stage whose parts stand apart.
        """
        work = _Parts(self, stage, machine, log)
        missing = [i for i in range(len(work.names)) if not work.stands(i, read=lead)]
        failed: dict[int, ValueError] = {}
        for i in missing if lead else []:
            if work.is_damaged(i):
                file = work.folder / work.names[i]
                log.note(f"{file} or a file beside it is damaged; it is made again")
                (work.folder / f".{work.names[i]}.sum").unlink()
        counter = log.counter(stage.name, len(work.names), len(work.names) - len(missing))
        after = [t for t in stages if isinstance(t, SplitStage) and t.follows == stage]
        followers = [
            _Parts(self, t, machine, log)
            for t in after
            if all(s == stage or self.done(s) for s in t.inputs)
        ]
        try:
            while missing:
                made = 0
                for i in missing:
                    try:
                        mine = work.make(i)
                    except ValueError as error:
                        if not stage.APART:
                            raise
                        failed[i] = error
                        log.note(f"{work.names[i]} failed: {error}")
                        continue
                    if mine:
                        made += 1
                        counter.update(counter.done + 1)
                        for follower in followers:
                            follower.make(i)
                if not lead:
                    break
                missing = [i for i in missing if i not in failed and not work.stands(i)]
                if missing and not made:
                    time.sleep(PAUSE)
        finally:
            counter.close()
        if failed:
            told = ", ".join(work.names[i] for i in failed)
            raise ValueError(
                f"{len(failed)} of {len(work.names)} parts of {stage.name} failed: {told} (first: "
                f"{next(iter(failed.values()))}); the others are kept, and once this is put right "
                "the same command makes what is missing"
            )

    @contextmanager
    def locked(
        self, stage: Stage, head: str, machine: Machine, log: Log, stages: Sequence[Stage]
    ) -> Iterator[None]:
        """Hold the stage's lock; who finds it taken makes parts of it, or says that it waits."""
        folder = self.folders[stage]
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        taken = joined = False
        while not lock.is_locked:
            try:
                lock.acquire(timeout=PAUSE if taken else 0)
                continue
            except Timeout:
                pass
            if isinstance(stage, SplitStage) and not joined and self._begun(stage, machine):
                joined = taken = True
                log.say(f"{head}: takes part in what another run has begun")
                self._share(stage, machine, log, stages, lead=False)
            elif not taken:
                taken = True
                log.say(f"{head}: waits for another run that works on the same stage")
        try:
            yield
        finally:
            lock.release()

    def _reuse(self, stage: Stage, head: str, log: Log) -> bool:
        marker = self.done(stage)
        if marker is not None:
            log.say(f"{head}: reused from {self.folders[stage]} ({marker['when']})")
        return marker is not None

    def _follow(
        self, stage: Stage, machine: Machine, damaged: tuple[str, dict[str, Any]] | None = None
    ) -> bool:
        """Wait as a follower; True when the leader began work in which every rank takes part."""
        parent = os.getppid()
        stale = None if damaged is None else damaged[1]  # a mark that the leader will take off
        while self.done(stage) in (None, stale):
            if stage.RANKS != "leader" and self._begun_by_my_leader(stage):
                return True
            if isinstance(stage, SplitStage) and self._begun(stage, machine):
                return True
            if os.getppid() != parent:
                raise SystemExit(1)  # rank 0 ended, and said why
            time.sleep(PAUSE)
        return False

    def _begun_by_my_leader(self, stage: Stage) -> bool:
        """Tell the leader's mark from one that a killed launch left behind."""
        mark = self._mark(stage)
        if mark is None:
            return False
        # Lightning's own launcher starts the followers as children of the leader, in the middle of
        # its work; torchrun and Slurm start all ranks alike, with one launch id in the environment
        return mark["pid"] == os.getppid() or (bool(launch()) and mark["launch"] == launch())

    def _begun(self, stage: SplitStage, machine: Machine) -> bool:
        """Say whether anybody began to make the parts that this process would make."""
        mark = self._mark(stage)
        return mark is not None and mark["parts"] == self._parts(stage, machine)

    def _mark(self, stage: Stage) -> dict[str, Any] | None:
        """Read what a process that works on a stage notes in its folder."""
        try:
            return json.loads((self.folders[stage] / "running.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def _parts(self, stage: Stage, machine: Machine) -> str | None:
        """Return what processes share that would make the same bytes of a stage's parts."""
        if not isinstance(stage, SplitStage):
            return None
        kind = str(machine.device).partition(":")[0]
        return _sum({"parts": [*stage.parts(self.folders, machine)], "device": kind})


class _Parts:
    """The parts of a split stage, as one process makes them."""

    def __init__(self, store: Store, stage: SplitStage, machine: Machine, log: Log) -> None:
        folders = store.folders
        self.store, self.stage, self.folder = store, stage, folders[stage]
        self.names = stage.parts(folders, machine)
        self.use = (folders, machine, log)

    def done(self) -> bool:
        """Say whether the whole stage is done."""
        return self.store.done(self.stage) is not None

    @cached_property
    def maker(self) -> Callable[[int], None]:
        """What makes a part; loading it may take long."""
        return self.stage.open(self.folder, *self.use)

    def stands(self, i: int, read: bool = False) -> bool:
        """Say whether the files of part i were written, and with `read` whether they are so yet."""
        noted = _Noted.of(self.folder, self.names[i])
        if not noted.files or noted.key != self.stage.key:
            return False
        if not read:
            return all((self.folder / file).exists() for file in noted.files)
        with suppress(OSError):
            return noted.files == {f: file_hash(self.folder / f) for f in noted.files}
        return False

    def is_damaged(self, i: int) -> bool:
        """Say whether part i, which does not stand, was written once."""
        name = self.names[i]
        ours = _Noted.of(self.folder, name).key in ("", self.stage.key)
        return ours and (self.folder / name).exists() and (self.folder / f".{name}.sum").exists()

    def make(self, i: int) -> bool:
        """Make part i; False where it stands, or another process makes it."""
        name, (folders, machine, _) = self.names[i], self.use
        if self.done() or self.stands(i):
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        # the lock belongs to the operating system, so that of a killed process is free
        path = self.folder / f".{name}.lock"
        with suppress(Timeout), FileLock(path).acquire(timeout=0):
            if self.done():  # locks and notes of parts went away, and none comes back
                path.unlink(missing_ok=True)
            elif not self.stands(i):
                make, begun = self.maker, time.monotonic()
                make(i)
                seconds = time.monotonic() - begun
                files = [*self.stage.beside(i, folders, machine), name]
                sums = {file: file_hash(self.folder / file) for file in files}
                _Noted(self.stage.key, sums, seconds).write(self.folder, name)
                return True
        return False


class _Noted(NamedTuple):
    """What stands beside a finished part until the whole stage is done."""

    key: str
    """Of the stage; parts of another one in the same home are none of this one's."""
    files: dict[str, str]
    """Name -> sha256 of all files that it wrote; empty where nothing whole is noted."""
    seconds: float
    """How long it took."""

    @classmethod
    def of(cls, folder: Path, name: str) -> "_Noted":
        try:
            content = json.loads((folder / f".{name}.sum").read_text())
            noted = cls(content["key"], {**content["files"]}, float(content["seconds"]))
        except (OSError, ValueError, TypeError, KeyError):  # not there, no JSON, no mapping
            return cls("", {}, 0.0)
        return noted if name in noted.files else cls("", {}, 0.0)

    def write(self, folder: Path, name: str) -> None:
        write_json(folder / f".{name}.sum", self._asdict())


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

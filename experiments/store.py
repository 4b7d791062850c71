"""Results of stages: one folder per stage and key, locked while in work, marked when done."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

Say = Callable[[str], None]
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")


def is_leader() -> bool:
    """Say whether this process is rank 0 of its launch (also true without any launcher)."""
    return not any(int(os.environ.get(name) or 0) for name in RANKS)


@dataclass(frozen=True)
class Stage:
    """One step of a run: its name and the key of the settings that can change its result."""

    name: str
    key: str

    @property
    def folder(self) -> str:
        """Name of the folder that holds the result."""
        return f"{self.name}-{self.key}"


class Store:
    """Stage folders `root/<name>-<key>/`; a result stands once `done.json` is in its folder."""

    def __init__(self, root: Path | str, order: Sequence[str] = (), leader: bool | None = None):
        """Open a store; nothing is written before the first stage runs.

        Args:
            root: the folder of all stage folders.
            order: names of the stages of this run, for lines such as "[2/6] cache".
            leader: whether this process decides; default: rank 0 does.
        """
        self.root = Path(root)
        self.order = list(order)
        self.leader = is_leader() if leader is None else leader

    def folder(self, stage: Stage) -> Path:
        """Path of the stage's result, which may not exist yet."""
        return self.root / stage.folder

    def done(self, stage: Stage) -> dict[str, Any] | None:
        """Read the marker of a finished stage; None where the result does not stand."""
        try:
            return json.loads((self.folder(stage) / "done.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def run(
        self,
        name: str,
        key: str,
        settings: dict[str, Any],
        work: Callable[[Path], dict[str, Any]],
        say: Say,
        everyone: bool = False,
    ) -> Path:
        """Return the folder of a finished stage, working for it only where no result stands.

        A stage that was interrupted keeps its folder: `work` finds what it left and goes on.
        Of several ranks only the leader works and marks; the others wait for the marker, or, with
        `everyone`, work beside the leader in the same folder (training) as soon as it has begun.

        Args:
            name: the stage, as in `order`.
            key: `config.stage_key` of everything that can change the result.
            settings: plain containers, kept in the marker for the reader.
            work: does the stage in the given folder; its small dict is kept in the marker.
            say: gets one line per event.
            everyone: every rank takes part in the work.

        Raises:
            SystemExit: the leader of this launch ended before the stage was done.
        """
        stage = Stage(name, key)
        folder = self.folder(stage)
        if not self.leader:
            if self._follow(stage, everyone):
                work(folder)
            return folder
        if self._reuse(stage, say):
            return folder
        with self.work(stage, say):
            if self._reuse(stage, say):  # another run finished it while this one waited
                return folder
            self._say(
                say, name, f"continues in {folder}" if folder.exists() else f"runs in {folder}"
            )
            folder.mkdir(parents=True, exist_ok=True)
            start = time.monotonic()
            _write(folder / "running.json", {"pid": os.getpid(), "launch": _launch()})
            try:
                what = work(folder)
            finally:
                (folder / "running.json").unlink(missing_ok=True)
            seconds = round(time.monotonic() - start, 2)
            when = datetime.now(UTC).isoformat(timespec="seconds")
            marker = {"stage": name, "key": key, "seconds": seconds, "when": when}
            _write(folder / "done.json", {**marker, "what": what, "settings": settings})
            self._say(say, name, f"done in {_duration(seconds)}")
        return folder

    @contextmanager
    def work(self, stage: Stage, say: Say) -> Iterator[Path]:
        """Hold the stage's lock; another run that asks for it says that it waits.

        The lock belongs to the operating system, so that of a killed process is free.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / f".{stage.folder}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self._say(say, stage.name, "waits for another run that works on the same stage")
            lock.acquire()
        try:
            yield self.folder(stage)
        finally:
            lock.release()

    def _reuse(self, stage: Stage, say: Say) -> bool:
        marker = self.done(stage)
        if marker is not None:
            self._say(say, stage.name, f"reused from {self.folder(stage)} ({marker['when']})")
        return marker is not None

    def _follow(self, stage: Stage, everyone: bool, pause: float = 0.2) -> bool:
        """Wait as a follower; True when the leader began work in which every rank takes part."""
        parent = os.getppid()
        while self.done(stage) is None:
            if everyone and self._begun_by_my_leader(stage):
                return True
            if os.getppid() != parent:
                raise SystemExit(1)  # rank 0 ended, and said why
            time.sleep(pause)
        return False

    def _begun_by_my_leader(self, stage: Stage) -> bool:
        """Tell the leader's mark from one that a killed launch left behind."""
        try:
            mark = json.loads((self.folder(stage) / "running.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        # Lightning's own launcher starts the followers as children of the leader, in the middle of
        # its work; torchrun and Slurm start all ranks alike, with one launch id in the environment
        return mark["pid"] == os.getppid() or (bool(_launch()) and mark["launch"] == _launch())

    def _say(self, say: Say, name: str, text: str) -> None:
        if name in self.order:
            say(f"[{self.order.index(name) + 1}/{len(self.order)}] {name}: {text}")
        else:
            say(f"{name}: {text}")


def _launch() -> str:
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    job = [os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "/".join(os.environ.get(name, "") for name in names)
    return "/".join(part for part in job if part)


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1, default=str))
    os.replace(temporary, path)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"

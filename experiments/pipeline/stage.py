"""Stages: frozen dataclasses whose fields are all that they read, and whose keys follow from them.

So key and work cannot drift apart. A setting that is no field cannot change a result; a field that
changes re-makes exactly what builds on it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from data.files import file_hash
from experiments.progress import Counter, waiting

Say = Callable[[str], None]


# metadata of a field that shows something of the work and changes no result, as a monitor does
UNKEYED = {"unkeyed": True}


@dataclass(frozen=True)
class Machine:
    """Where and how stages work; nothing of it changes a result, so nothing of it is in a key."""

    device: str = "cpu"
    """Where a single process encodes, samples and scores: cpu, cuda or mps."""
    batch_size: int = 64
    """Pictures that are encoded, sampled or read at once: the one shape of all batches."""
    max_skipped: float = 0.2
    """Share of bad samples at which a stage stops."""
    workers: int = 0
    """Processes that read and decode training samples; 0 does so in the training process."""
    progress: str = "auto"
    """Display: auto, rich, plain or none."""
    classifiers: Path = Path("runs/cache/classifiers")
    """Folder of the classifiers that do not ship."""
    trainer: Mapping[str, Any] = field(default_factory=dict)
    """accelerator, devices, num_nodes, strategy, checkpoint_activations, compile of trainings."""
    loggers: Mapping[str, Any] = field(default_factory=dict)
    """Name of a training stage -> Lightning logger of its curves, besides the CSV."""


class Log:
    """What a stage tells the person at the keyboard.

    Args:
        say: gets one line per event.
        style: display of progress, see `Counter`.
    """

    def __init__(self, say: Say, style: str = "auto") -> None:
        self.say, self.style = say, style

    def note(self, text: str) -> None:
        """Say something beside the stages' own lines."""
        self.say(f"      {text}")

    def counter(self, what: str, total: int, done: int = 0) -> Counter:
        """Begin to count."""
        return Counter(what, total, self.say, self.style, done)

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """Say now and then that work without parts goes on."""
        return waiting(what, self.say, self.style)


class Folders:
    """The folders of the stages that a stage builds on.

    Args:
        root: holds them by name and key.
        homes: folders of stages that lie elsewhere.
    """

    def __init__(self, root: Path, homes: Mapping["Stage", Path] | None = None) -> None:
        self.root, self.homes = root, dict(homes or {})

    def __getitem__(self, stage: "Stage") -> Path:
        return self.homes.get(stage, self.root / stage.folder)


@dataclass(frozen=True, eq=False)
class Stage:
    """One step of a run. Its fields are plain values, other stages, and Paths of files.

    A Path stands for the content of its file (or of the files of its folder), a stage for its key.
    """

    NAME: ClassVar[str] = ""
    """What a person and the folder call it; fields may stand in braces."""
    VERSION: ClassVar[int] = 1
    """Raised when the meaning of the code changes."""
    RANKS: ClassVar[Literal["leader", "split", "all"]] = "leader"
    """Who works: rank 0, all ranks on parts of their own, or all together (a training)."""

    @property
    def name(self) -> str:
        """Name of the stage."""
        return (self.NAME or type(self).__name__.lower()).format(**vars(self))

    @cached_property
    def key(self) -> str:
        """12 hex digits of the SHA-256 of class, version and fields."""
        text = json.dumps(self.content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def content(self) -> dict[str, Any]:
        """What the key is made of, as plain containers."""
        return {"stage": type(self).__name__, "version": self.VERSION, **_fields(self)}

    @property
    def folder(self) -> str:
        """Name of the folder that holds the result."""
        return f"{self.name}-{self.key}"

    @property
    def inputs(self) -> list["Stage"]:
        """The stages among the fields, also inside of other fields."""
        return list(_stages(vars(self).values()))

    def run(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        """Make the result in `folder`, going on with what an interrupted call left there.

        Returns:
            A small dict for the marker of the finished stage.

        Raises:
            ValueError, OSError: what a person can put right, in one sentence.
        """
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stage) and other.folder == self.folder

    def __hash__(self) -> int:
        return hash(self.folder)


@dataclass(frozen=True, eq=False)
class FileStage(Stage):
    """A stage whose result is a file of weights."""

    def file(self, inputs: Folders) -> Path:
        """Path of the file."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class SplitStage(Stage):
    """A stage in parts, of which any number of processes makes each once.

    A part depends on the stage alone, not on who makes it: the result is the same however the work
    was divided or broken off.
    """

    RANKS = "split"
    APART: ClassVar[bool] = False
    """Whether a part that fails says nothing of the others, which are made all the same."""

    def parts(self, inputs: Folders, machine: Machine) -> Sequence[str]:
        """Name the file that stands in the folder once a part is done, for every part."""
        raise NotImplementedError

    def beside(self, i: int, inputs: Folders, machine: Machine) -> Sequence[str]:
        """Name the files that part i writes besides."""
        return []

    @property
    def follows(self) -> "SplitStage | None":
        """The stage of as many parts whose part i is all that part i of this one waits for."""
        return None

    def open(
        self, folder: Path, inputs: Folders, machine: Machine, log: Log
    ) -> Callable[[int], None]:
        """Load what the parts need, and return what makes part i, its file last."""
        raise NotImplementedError

    def finish(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        """Close the result when all parts are done; what it returns is kept in the marker."""
        return {}


def order(targets: Iterable[Stage]) -> list[Stage]:
    """List stages and all that they build on, each once, what is needed first."""
    found: dict[Stage, None] = {}

    def visit(stage: Stage) -> None:
        if stage not in found:
            for needed in stage.inputs:
                visit(needed)
            found[stage] = None

    for target in targets:
        visit(target)
    return list(found)


def plain_paths(value: Any) -> Any:
    """Return plain containers with texts in the place of Paths, as modules take them."""
    if isinstance(value, Mapping):
        return {k: plain_paths(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_paths(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _fields(node: Any) -> dict[str, Any]:
    keyed = [f for f in dataclasses.fields(node) if not f.metadata.get("unkeyed")]
    return {f.name: plain_content(getattr(node, f.name)) for f in keyed}


def plain_content(value: Any) -> Any:
    """Return plain containers of what a field means, as a key is made of them."""
    if isinstance(value, Stage):
        return {"key": value.key, "of": value.name}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"is": type(value).__name__, **_fields(value)}
    if isinstance(value, Path):
        files = sorted(p for p in value.rglob("*") if p.is_file()) if value.is_dir() else [value]
        return {"sha256": [file_hash(path) for path in files]}
    if isinstance(value, Mapping):
        return {str(k): plain_content(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_content(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a field of a stage holds a {type(value).__name__}, which has no key")


def _stages(values: Iterable[Any]) -> Iterator[Stage]:
    for value in values:
        if isinstance(value, Stage):
            yield value
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _stages(vars(value).values())
        elif isinstance(value, Mapping):
            yield from _stages(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _stages(value)

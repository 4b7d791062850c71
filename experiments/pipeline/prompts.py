"""Lists of what is asked of a generator: captions of COCO, a file, classes, or nothing.

Every row has an id, by which its picture is named and its seed is chosen, so that no picture hangs
on its place in the list.
"""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from data.coco import read_captions
from data.files import decode_text, write_json
from experiments.pipeline.data import Asked
from experiments.pipeline.stage import Folders, Log, Machine, Stage

IDS = ("image_id", "id", "coco_id", "key")
TEXTS = ("text", "caption", "prompt")
SHOWN = 5  # ids that a message names


@dataclass(frozen=True)
class CocoCaptions:
    """So many pictures of a COCO split without replacement, one caption of each.

    The order is that of sha256("seed/id"): the same under every version of every library, and the
    first 10,000 of 30,000 are the list of 10,000.
    """

    file: Path
    """captions_val2014.json."""
    seed: int = 0

    @property
    def name(self) -> str:
        """What the list is called."""
        return f"{self.file.stem}, one caption each, seed {self.seed}"

    def rows(self, count: int | None) -> list[Asked]:
        """Draw the list; a picture without a caption has no place in it.

        Raises:
            ValueError: no captions of COCO, or fewer pictures than `count`.
        """
        faults: Counter[str] = Counter()
        found = [p for p in read_captions(self.file, faults=faults) if p["captions"]]
        if count is not None and count > len(found):
            told = "; ".join(f"{n} x {what}" for what, n in sorted(faults.items()))
            raise ValueError(
                f"{self.file} has captions of {len(found)} pictures, fewer than the {count} that "
                f"are asked{f' ({told})' if told else ''}; lower --num, or download it again"
            )
        found.sort(key=lambda p: (_number(f"{self.seed}/{p['id']}"), p["id"]))
        return [
            {
                "id": str(p["id"]),
                "number": p["id"],
                "prompt": p["captions"][
                    _number(f"{self.seed}/{p['id']}/caption") % len(p["captions"])
                ],
                "file": f"{p['id']:012d}.png",
            }
            for p in found[:count]
        ]


@dataclass(frozen=True)
class PromptFile:
    """A list that somebody wrote: csv, tsv, json or one prompt per line."""

    file: Path

    @property
    def name(self) -> str:
        """What the list is called."""
        return self.file.name

    def rows(self, count: int | None) -> list[Asked]:
        """Read the first rows.

        Raises:
            ValueError: no such list, no prompts, or ids that occur twice.
        """
        try:
            text = decode_text(self.file.read_bytes())
            pairs = list(_pairs(self.file, text))
        except (ValueError, csv.Error, RecursionError) as error:
            raise ValueError(f"{self.file} is no list of prompts: {error}") from error
        pairs = pairs[:count]
        if not pairs or (count is not None and len(pairs) < count):
            wanted = "one" if count is None else f"the {count} that are asked"
            raise ValueError(f"{self.file} holds {len(pairs)} prompts, fewer than {wanted}")
        named = [str(i if given is None else given).strip() for i, (given, _) in enumerate(pairs)]
        twice = [name for name, times in Counter(named).items() if times > 1]
        if twice:
            raise ValueError(
                f"{self.file} has {len(twice)} ids more than once ({some(twice)}): pictures are "
                "named by them, so give every row an id of its own"
            )
        numbers = [int(name) if name.isdecimal() else i for i, name in enumerate(named)]
        if len({*numbers}) < len(numbers):  # a text that is no number may meet one that is
            numbers = [*range(len(numbers))]
        return [
            {"id": name, "number": number, "prompt": prompt, "file": _file(name)}
            for name, number, (_, prompt) in zip(named, numbers, pairs, strict=True)
        ]


@dataclass(frozen=True)
class ClassList:
    """Classes in turn: picture i is of class i mod K."""

    classes: int

    @property
    def name(self) -> str:
        """What the list is called."""
        return f"{self.classes} classes in turn"

    def rows(self, count: int | None) -> list[Asked]:
        """Return `count` rows, by default one per class."""
        labels = [i % self.classes for i in range(count or self.classes)]
        return [
            {"id": f"{i:06d}", "number": i, "prompt": str(k), "label": k, "file": f"{i:06d}.png"}
            for i, k in enumerate(labels)
        ]


@dataclass(frozen=True)
class NoPrompts:
    """Nothing is asked: unconditional pictures."""

    name = "unconditional"

    def rows(self, count: int | None) -> list[Asked]:
        """Return `count` rows with an empty prompt.

        Raises:
            ValueError: no count.
        """
        if count is None:
            raise ValueError("--num is missing: nothing else says how many pictures to draw")
        return [
            {"id": f"{i:06d}", "number": i, "prompt": "", "file": f"{i:06d}.png"}
            for i in range(count)
        ]


PromptSource = CocoCaptions | PromptFile | ClassList | NoPrompts


@dataclass(frozen=True, eq=False)
class Prompts(Stage):
    """A list of prompts, written down."""

    source: PromptSource
    count: int | None = None
    """Rows, the first ones; None takes all that there are."""

    split: ClassVar[str] = "prompts"

    @property
    def captioned(self) -> bool:
        """Whether the prompts say anything of the pictures."""
        return not isinstance(self.source, (ClassList, NoPrompts))

    def run(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        """Write the list."""
        rows = self.source.rows(self.count)
        write_json(folder / "prompts.json", [{**row, "split": self.split} for row in rows])
        return {"prompts": len(rows), "sha256": list_hash(rows)}

    def rows(self, inputs: Folders) -> list[Asked]:
        """Return the list."""
        path = inputs[self] / "prompts.json"
        return _read(path, path.stat().st_mtime_ns)


def list_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the sha256 of a list: of its ids and prompts (or classes), line by line."""
    lines = (f"{row['id']}\t{row.get('label', row['prompt'])}\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def remarks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what of a list may surprise: captions that occur twice, or that are very long."""
    texts = [row["prompt"] for row in rows if "label" not in row and row["prompt"]]
    double = len(texts) - len({*texts})
    words = [len(text.split()) for text in texts]
    said = []
    if double:
        said.append(f"{double} of {len(texts)} prompts occur earlier in the list, too")
    if max(words, default=0) > 77:
        count = sum(n > 77 for n in words)
        said.append(
            f"{count} of {len(texts)} prompts have more than 77 words (at most {max(words)}); text "
            "encoders cut them"
        )
    return said


def some(names: Sequence[str]) -> str:
    """Name the first few of many."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest())


def _file(name: str) -> str:
    """Name a picture by its id, which may hold anything."""
    safe = name and all(c.isalnum() or c in "-_." for c in name) and not name.startswith(".")
    if not safe or len(name) > 100:
        name = f"sha256-{hashlib.sha256(name.encode()).hexdigest()[:24]}"
    return f"{int(name):012d}.png" if name.isascii() and name.isdecimal() else f"{name}.png"


def _pairs(file: Path, text: str) -> Iterable[tuple[Any, str]]:
    """Return id (None where there is none) and prompt of every row, as the file's suffix says."""
    suffix = file.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _table(text, "\t" if suffix == ".tsv" else ",")
    if suffix == ".json":
        return _entries(json.loads(text))
    if suffix == ".jsonl":
        return _entries([json.loads(line) for line in text.splitlines() if line.strip()])
    return [(None, clean(line)) for line in text.splitlines() if line.strip()]


def _table(text: str, delimiter: str) -> list[tuple[Any, str]]:
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    names = reader.fieldnames or []
    own, prompt = (next((n for n in known if n in names), None) for known in (IDS, TEXTS))
    if prompt is None:
        raise ValueError(f"its first line names none of the columns {', '.join(TEXTS)}")
    return [(row[own] if own else None, clean(row[prompt])) for row in reader]


def _entries(content: Any) -> list[tuple[Any, str]]:
    if isinstance(content, Mapping):
        return [(key, clean(value)) for key, value in content.items()]
    if not isinstance(content, list):
        raise ValueError("it is neither a list nor a mapping of ids to prompts")
    pairs = []
    for entry in content:
        if isinstance(entry, Mapping):
            own, prompt = (next((n for n in known if n in entry), None) for known in (IDS, TEXTS))
            pairs.append((entry[own] if own else None, clean(entry[prompt] if prompt else None)))
        else:
            pairs.append((None, clean(entry)))
    return pairs


def clean(text: Any) -> str:
    """Strip a caption, line breaks inside made spaces.

    Raises:
        ValueError: it is no text.
    """
    if not isinstance(text, str):
        raise ValueError(f"a row holds {text!r} where a prompt should be")
    return " ".join(part.strip() for part in text.strip().splitlines())


@lru_cache(maxsize=4)  # every batch of a sampling asks for them
def _read(path: Path, mtime_ns: int) -> list[Asked]:
    return json.loads(path.read_text())

"""Folders of pictures: ImageNet's classes, faces without captions, and Hugging Face's imagefolder.

Splits are folders named as `datasets` names them (train, validation or val or dev, test, ...).
Captions and labels come from metadata.csv, .jsonl or .parquet beside or above the pictures (column
file_name), else the class is the name of a picture's folder.
"""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data.files import decode_text
from data.listing import SUFFIXES, Row, first_of, is_picture, read_lines
from data.names import aliased, split_of, texts

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
WNID = re.compile(r"n\d{8}")
IMAGENET = ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "ILSVRC2012", "imagenet")


def index(root: Path) -> list[Path]:
    """Return the folders, to the second level, and the tables that say what a corpus holds.

    Raises:
        ValueError: no picture lies below the root.
    """
    if next(pictures(root), None) is None:
        linked = "; links to folders are not followed" if links(root) else ""
        raise ValueError(f"no picture ({', '.join(SUFFIXES)}) lies below {root}{linked}")
    folders = [root]
    for folder in [root, *_folders(root)]:
        folders += _folders(folder)
    unique = list(dict.fromkeys(folders))
    return unique + [f / name for f in unique for name in METADATA if (f / name).is_file()]


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        found = [entry.name for entry in entries if entry.is_dir()]
    return [folder / name for name in sorted(found) if not name.startswith(".")]


def pictures(root: Path) -> Iterator[str]:
    """Yield the paths of all pictures below a root, relative to it, in order."""
    for folder, folders, files in os.walk(root, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(folder).relative_to(root).as_posix()
        for name in sorted(files):
            if is_picture(name):
                yield name if below == "." else f"{below}/{name}"


def _unreadable(error: OSError) -> None:
    raise error  # os.walk would pass over the folder without a word


def links(root: Path) -> int:
    """Return how many links to folders lie below a root, which are not followed."""
    return sum((Path(f) / name).is_symlink() for f, names, _ in os.walk(root) for name in names)


def rows(
    root: Path, faults: Counter[str], *, labels: bool = False, first_val: int | None = None
) -> Iterator[Row]:
    """Yield a row per picture.

    Args:
        root: the folder.
        faults: counts links to folders, and pictures that the metadata say nothing of.
        labels: whether folders inside of a split are classes.
        first_val: from this number on, files named by numbers are validation.

    Raises:
        ValueError: a table that cannot be read.
    """
    files = list(pictures(root))
    if linked := links(root):
        faults["a link to a folder, which is not followed"] += linked
    tables = {f: _table(root, f) for f in dict.fromkeys(_parents(files)) if _metadata(root, f)}
    if tables:
        yield from _described(files, tables, faults)
        return
    splits = {file: split_of(Path(file).parts[:-1]) for file in files}
    if not {"train"} < {*splits.values()} - {""}:  # a class may be called train, too
        splits = dict.fromkeys(files, "")
    if first_val is not None:
        _check_once(root, files)
    inner = {file: _inner(file) if splits[file] else Path(file).parts[:-1] for file in files}
    names = sorted({parts[-1] for parts in inner.values() if parts})
    # as `datasets`: folders are classes where there are several, all pictures at one depth
    classes = names if len(names) > 1 and len({len(p) for p in inner.values()}) == 1 else []
    for file in files:
        split = splits[file]
        if first_val is not None and not split and (stem := Path(file).stem).isdecimal():
            split = "val" if int(stem) >= first_val else "train"
        label, captions = None, tuple[str, ...]()
        if labels and classes:
            label = classes.index(inner[file][-1])
            captions = (inner[file][-1].replace("_", " "),)
        yield Row(_key(file), file, captions, split, label)


def _check_once(root: Path, files: Sequence[str]) -> None:
    """Refuse a corpus that lies in a folder in several sizes."""
    known: dict[str, str] = {}
    for file in files:
        stem = Path(file).stem
        if stem in known:
            raise ValueError(
                f"{root} holds the picture {stem} more than once, as {known[stem]} and {file}: "
                "name the folder of one size"
            )
        known[stem] = file


def _key(file: str) -> str:
    return os.path.splitext(file)[0]


def _inner(file: str) -> tuple[str, ...]:
    """Return the folders of a picture that do not name its split."""
    return tuple(name for name in Path(file).parts[:-1] if not split_of([name]))


def _parents(files: Sequence[str]) -> Iterator[str]:
    """Yield every folder that a picture lies below, "" for the root."""
    for folder in dict.fromkeys(os.path.dirname(file) for file in files):
        while folder:
            yield folder
            folder = os.path.dirname(folder)
    yield ""


def _metadata(root: Path, folder: str) -> Path | None:
    return next((p for name in METADATA if (p := root / folder / name).is_file()), None)


def _table(root: Path, folder: str) -> list[dict[str, Any]]:
    """Read the metadata of a folder.

    Raises:
        ValueError: no table, or one without file_name.
    """
    path = _metadata(root, folder)
    assert path is not None
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            found = pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix == ".csv":
            found = list(csv.DictReader(io.StringIO(decode_text(path.read_bytes()))))
        else:
            found = [json.loads(line) for line in read_lines(path)]
    except Exception as error:  # pyarrow's errors have no base of their own
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not found or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{path} holds no rows")
    if "file_name" not in found[0]:
        raise ValueError(f"{path} has no column file_name: it has {', '.join(map(str, found[0]))}")
    return found


def _described(
    files: Sequence[str], tables: dict[str, list[dict[str, Any]]], faults: Counter[str]
) -> Iterator[Row]:
    """Yield the rows of tables: each names a picture, its captions and its label."""
    found = [
        (os.path.normpath(f"{folder}/{row['file_name']}") if folder else str(row["file_name"]), row)
        for folder, table in tables.items()
        for row in table
        if row.get("file_name")
    ]
    said = {aliased("label", row) for _, row in found}
    classes = sorted(name for name in said if isinstance(name, str) and not name.isdecimal())
    for file, row in found:
        label = aliased("label", row)
        if isinstance(label, str):
            label = int(label) if label.isdecimal() else classes.index(label)
        meta = {name: value for name, value in row.items() if isinstance(value, (int, float))}
        captions = texts(aliased("caption", row))
        split = split_of(Path(file).parts[:-1])
        yield Row(_key(file), file, captions, split, label if type(label) is int else None, meta)
    if alone := set(files) - {file for file, _ in found}:
        faults["a picture of which the metadata say nothing"] += len(alone)


def imagenet_folders(root: Path) -> tuple[Path, Path]:
    """Return the folders of training and validation.

    Raises:
        ValueError: one is missing, or the first has no folder that is named by a WordNet id.
    """
    base = next((root / place for place in IMAGENET if (root / place / "train").is_dir()), None)
    if base is None:
        raise ValueError(
            f"the train split of ImageNet is missing: there is no folder train in {root}, nor "
            f"below its {' or '.join(IMAGENET[1:])}"
        )
    if not wnids(base / "train"):
        raise ValueError(
            f"{base / 'train'} has no folder that is named by a WordNet id, such as n01440764: "
            "unpack the tar of every class into one"
        )
    val = first_of(base, ["val", "validation"], "the val split of ImageNet")
    return base / "train", val


def wnids(folder: Path) -> list[str]:
    """Return the classes of a folder in the official order."""
    return [path.name for path in _folders(folder) if WNID.fullmatch(path.name)]


def imagenet_index(root: Path) -> list[Path]:
    """Return the folders and tables that say what ImageNet holds.

    Raises:
        ValueError: a split is missing, or a flat validation split has no table of its labels.
    """
    train, val = imagenet_folders(root)
    folders = [*(train / w for w in wnids(train)), val, *(val / w for w in wnids(val))]
    return [train, *folders, *([] if wnids(val) else [_solution(root, val)])]


def _solution(root: Path, val: Path) -> Path:
    name = "LOC_val_solution.csv"
    found = next((f / name for f in (root, val, val.parent) if (f / name).is_file()), None)
    if found is None:
        raise ValueError(
            f"{val} has neither a folder for every class nor, in {root}, {name} of Kaggle, which "
            "says the classes of its pictures"
        )
    return found


def imagenet_rows(root: Path, faults: Counter[str]) -> Iterator[Row]:
    """Yield a row per picture of ImageNet; label i is the i-th of the sorted WordNet ids.

    Args:
        root: with train and val, or Kaggle's ILSVRC/Data/CLS-LOC.
        faults: counts pictures of which no class is known.

    Raises:
        ValueError: a split is missing, or validation has a class that training has not.
    """
    train, val = imagenet_folders(root)
    classes = wnids(train)
    captions = {wnid: (name,) for wnid, name in class_names(root, classes).items()}
    numbers = {wnid: i for i, wnid in enumerate(classes)}
    for split, folder in {"train": train, "val": val}.items():
        below = folder.relative_to(root).as_posix()
        if more := [wnid for wnid in wnids(folder) if wnid not in numbers]:
            raise ValueError(f"{folder} has the class {more[0]}, which {train} has not")
        for wnid in wnids(folder):
            for file in sorted(filter(is_picture, os.listdir(folder / wnid))):
                name, base = os.path.splitext(file)[0], f"{below}/{wnid}"
                yield Row(name, file, captions[wnid], split, numbers[wnid], base=base)
    if wnids(val):
        return
    with open(_solution(root, val), newline="", encoding="utf-8") as table:
        said = {row["ImageId"]: row["PredictionString"] for row in csv.DictReader(table)}
    below = val.relative_to(root).as_posix()
    for file in sorted(filter(is_picture, os.listdir(val))):
        name = os.path.splitext(file)[0]
        wnid = said.get(name, "").partition(" ")[0]
        if wnid in numbers:
            yield Row(name, file, captions[wnid], "val", numbers[wnid], base=below)
        else:
            faults["a picture of val without a class of training"] += 1


def class_names(root: Path, classes: Sequence[str]) -> dict[str, str]:
    """Return the first name of WordNet ids: Kaggle's LOC_synset_mapping.txt, else timm's list.

    An id that neither knows is its own name.
    """
    own = root / "LOC_synset_mapping.txt"
    lines = read_lines(own) if own.is_file() else []
    spec = find_spec("timm")  # open_clip needs it; found, not imported
    if not lines and spec is not None and spec.origin is not None:
        shipped = Path(spec.origin).parent / "data" / "_info" / "imagenet_synset_to_lemma.txt"
        lines = read_lines(shipped) if shipped.is_file() else []
    known = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return {wnid: known.get(wnid, wnid).partition(",")[0] for wnid in classes}

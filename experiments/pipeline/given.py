"""What others made: a checkpoint that is sampled, and folders of pictures."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.files import file_hash, write_json
from experiments.pipeline.data import Asked
from experiments.pipeline.prompts import Prompts, some
from experiments.pipeline.stage import UNKEYED, Folders, Log, Machine, Stage

if TYPE_CHECKING:
    from torch import Tensor

    Images = Tensor | list[Tensor]

Cut = Literal["square", "short", "adm", "squash", "none"]
Filter = Literal["bicubic", "lanczos", "bilinear", "box"]
CUTS: dict[str, str] = {
    "square": "largest centre square, then resized",
    "short": "short side resized, then cut in the centre, as torchvision does",
    "adm": "halved with box filtering, resized bicubic, cut in the centre, as ADM does",
    "squash": "resized to a square whatever the shape",
    "none": "as they are",
}
THREADS = min(8, os.cpu_count() or 1)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, eq=False)
class GivenGenerator(Stage):
    """A finished checkpoint; it stays where it is."""

    NAME = "given-generator"

    path: Path
    files: tuple[Path, ...]
    """What it works with: first stages, further parts, text encoders."""
    paper: str | None = None
    """It is sampled as this paper does."""
    tokenizer: Path | None = None
    """Its first stage, where it is not the one beside it."""
    places: Mapping[str, str] = field(default_factory=dict, metadata=UNKEYED)
    """Where frozen text encoders lie on this machine, by setting of the text section."""

    def run(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        """Say where it is."""
        return {"from": str(self.path)}

    def load(self, inputs: Folders, machine: Machine) -> Any:
        """Return the module, frozen and ready to sample."""
        from lightning_modules.registry import load_generator

        module = load_generator(self.path, self.tokenizer, machine.device, self.paper)
        for name, place in self.places.items():
            setattr(module.config.text, name, place)  # the encoder reads it when it is first used
        return module


@dataclass(frozen=True)
class FolderPictures:
    """Pictures of a folder, known by their content."""

    folder: Path = field(metadata=UNKEYED)
    names: tuple[str, ...] = field(metadata=UNKEYED)
    """Paths below the folder, in order."""
    content: str
    """Hash of names and contents."""
    name: str = field(default="folder", metadata=UNKEYED)
    """What the stage of their features is called by."""
    prompts: Prompts | None = None
    """What was asked of the pictures, in their order."""
    strict: bool = True
    """Whether a broken picture stops the work; else it is left out and counted."""

    def rows(self, inputs: Folders) -> list[Asked]:
        """Return what is known of the pictures, in order."""
        if self.prompts is None:
            return [{"id": Path(name).stem, "prompt": "", "file": name} for name in self.names]
        asked = self.prompts.rows(inputs)
        return [{**row, "file": name} for row, name in zip(asked, self.names, strict=True)]

    def reader(
        self, inputs: Folders, machine: Machine
    ) -> Callable[[int, int], tuple[Images, list[Asked]]]:
        """Return what reads pictures [first, last): each [3, H, W] uint8, and what is known of it.

        One that cannot be read stops the work, or is left out where others are many enough.
        """
        rows, broken = self.rows(inputs), list[str]()
        pool = ThreadPoolExecutor(THREADS)  # Pillow frees the interpreter

        def one(name: str) -> Tensor | str:
            from data.images import open_image, to_rgb

            try:
                return _tensor(to_rgb(open_image((self.folder / name).read_bytes())))
            except Exception as error:  # a broken file makes Pillow raise almost anything
                return f"{self.folder / name} cannot be read: {error}"

        def read(first: int, last: int) -> tuple[Images, list[Asked]]:
            images, asked = [], []
            for k, found in enumerate(pool.map(one, self.names[first:last]), first):
                if isinstance(found, str):
                    broken.append(found)
                else:
                    images.append(found)
                    asked.append({**rows[k], "index": k})
            if broken and (self.strict or len(broken) > machine.max_skipped * len(rows)):
                raise ValueError(f"{broken[0]} (and {len(broken) - 1} more so far)")
            if not images:
                raise ValueError(f"no picture of {self.folder} can be read: {broken[-1]}")
            return _stacked(images), asked

        return read


@dataclass(frozen=True, eq=False)
class GivenMoments(Stage):
    """Mean and covariance of the features of real pictures that are not here."""

    NAME = "given-statistics"

    path: Path
    space: str
    """A key of eval.spaces.SPACES: which features it is believed to hold."""

    def run(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        """Speak up where the file holds none."""
        self.measured(inputs)
        return {"from": str(self.path)}

    def measured(self, inputs: Folders) -> tuple[Any, list[Asked]]:
        """Return them as the reference of a scorer."""
        from eval.statistics import read_reference

        return read_reference(self.path, self.space), []

    def count(self, inputs: Folders) -> int | None:
        """Return how many pictures they are of: nobody knows."""
        return None


@dataclass(frozen=True)
class Prepared:
    """Pictures brought to one size."""

    source: Any
    """Sample, FolderPictures, or others that have rows and a reader."""
    size: int
    """Width and height."""
    cut: Cut = "none"
    """How a square is made of pictures of another size."""
    filter: Filter = "bicubic"

    @property
    def name(self) -> str:
        """What the stage of their features is called by."""
        return f"{self.source.name}-{self.size}px"

    def rows(self, inputs: Folders) -> list[Asked]:
        """Return what is known of the pictures, in order."""
        return self.source.rows(inputs)

    def reader(
        self, inputs: Folders, machine: Machine
    ) -> Callable[[int, int], tuple[Images, list[Asked]]]:
        """Return what reads and prepares pictures [first, last)."""
        source = self.source.reader(inputs, machine)
        pool = ThreadPoolExecutor(THREADS)

        def read(first: int, last: int) -> tuple[Images, list[Asked]]:
            images, asked = source(first, last)
            return _stacked([*pool.map(self.apply, images)]), asked

        return read

    def apply(self, picture: Tensor) -> Tensor:
        """Prepare a picture [3, H, W] uint8."""
        from PIL import Image

        if picture.shape[1:] == (self.size, self.size):
            return picture
        image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        resample = Image.Resampling[self.filter.upper()]
        return _tensor(_cut(image, self.cut, self.size, resample))


def _tensor(image: Any) -> Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _stacked(images: list[Tensor]) -> Images:
    """Stack pictures where they have one size."""
    import torch

    return torch.stack(images) if len({i.shape for i in images}) == 1 else images


def _cut(image: Any, cut: str, size: int, resample: Any) -> Any:
    """Make a square of a picture of another size."""
    from data.crops import adm, crop_first, resize_first

    if cut == "square":
        return crop_first(image, size, resample=resample)
    if cut == "short":
        return resize_first(image, size, resample=resample)
    if cut == "adm":
        return adm(image, size)
    if cut == "squash":
        return image.resize((size, size), resample)
    raise ValueError(
        f"a picture has {image.width}x{image.height} pixels and not {size}x{size}; --crop says "
        f"how others are cut ({', '.join(CUTS)})"
    )


def pictures_of(folder: Path) -> list[str]:
    """Return the pictures below a folder by their paths from it, sorted; hidden ones are none.

    Raises:
        ValueError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    found = []
    for place, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        found += [
            os.path.relpath(os.path.join(place, name), folder)
            for name in files
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
        ]
    if not found:
        raise ValueError(f"{folder} holds no picture ({', '.join(SUFFIXES)})")
    return sorted(found)


def content_of(folder: Path, names: Sequence[str], notes: Path) -> str:
    """Return the sha256 of names and contents of pictures.

    Args:
        folder: the folder.
        names: the pictures in it.
        notes: folder that keeps the hash of every file with its size and time, so that a file that
            is as it was need not be read again.
    """
    place = hashlib.sha256(os.path.abspath(folder).encode()).hexdigest()[:16]
    path = notes / f"{place}.json"
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    found: dict[str, list[Any]] = {}
    total = hashlib.sha256()
    for name in names:
        status = (folder / name).stat()
        stamp = [status.st_size, status.st_mtime_ns]
        before = known.get(name, [])
        sha256 = before[2] if before[:2] == stamp else file_hash(folder / name)
        found[name] = [*stamp, sha256]
        total.update(f"{name}\t{sha256}\n".encode())
    if found != known:
        write_json(path, found)
    return total.hexdigest()


def matched(folder: Path, names: Sequence[str], asked: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the picture of every row of a list, by its id.

    A picture belongs to the id that is its name, or the number at the end of its name
    (COCO_val2014_000000000042.jpg and 42.png are of the id 42).

    Raises:
        ValueError: ids without a picture, or with two; the first are named.
    """
    of: dict[str, list[str]] = {}
    for name in names:
        stem = Path(name).stem
        digits = stem[len(stem.rstrip("0123456789")) :]
        for key in {stem, *([str(int(digits))] if digits else [])}:
            of.setdefault(key, []).append(name)
    found: list[str] = []
    missing: list[str] = []
    double: list[str] = []
    for row in asked:
        keys = [Path(row["file"]).stem, row["id"]]
        here = next((of[key] for key in keys if key in of), [])
        if len(here) == 1:
            found.append(here[0])
        (missing if not here else double if len(here) > 1 else []).append(row["id"])
    if missing:
        raise ValueError(
            f"{folder} lacks the pictures of {len(missing)} of {len(asked)} ids: {some(missing)}"
        )
    if double:
        raise ValueError(f"{folder} has several pictures of {len(double)} ids: {some(double)}")
    return found


def sizes_of(folder: Path, names: Sequence[str], strict: bool) -> dict[str, tuple[int, int]]:
    """Return width and height of pictures, from their headers alone.

    Args:
        folder: the folder.
        names: the files in it.
        strict: refuse files that are no pictures; else they are left out.

    Raises:
        ValueError: some, or all, are none; the first are named.
    """
    from PIL import Image

    from data.images import FORMATS

    def size_of(name: str) -> tuple[int, int] | None:
        try:
            with Image.open(folder / name, formats=FORMATS) as image:
                return image.size
        except Exception:  # a broken file makes Pillow raise almost anything
            return None

    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(names, pool.map(size_of, names), strict=True))
    broken = [name for name, size in found.items() if size is None]
    if broken and (strict or len(broken) == len(found)):
        raise ValueError(
            f"{len(broken)} of {len(found)} files of {folder} cannot be read as pictures: "
            f"{some(broken)}"
        )
    return {name: size for name, size in found.items() if size is not None}

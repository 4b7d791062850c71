"""Pictures as a first stage gives them back, as PNGs beside nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import write_json
from experiments.pipeline.data import Asked, Pictures
from experiments.pipeline.given import FolderPictures, Prepared
from experiments.pipeline.sample import batches, png_reader
from experiments.pipeline.stage import (
    UNKEYED,
    FileStage,
    Folders,
    Log,
    Machine,
    SplitStage,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Foreign(FileStage):
    """A first stage of others, as this suite reads it."""

    NAME = "converted"

    source: Path
    paper: str
    hints: Mapping[str, Any] = field(default_factory=dict)
    """What its tensors do not say, by the dotted keys of its settings."""
    read: Any = field(default=None, metadata=UNKEYED)
    """The paper's reader: (source, hints, aside) -> tensors and settings."""

    def run(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        """Convert it."""
        from lightning_modules.common.checkpoint import save_weights

        save_weights(self.file(inputs), *self.read(self.source, self.hints, None))
        return {"from": str(self.source)}

    def file(self, inputs: Folders) -> Path:
        """Path of the file."""
        return inputs[self] / "first_stage.safetensors"


@dataclass(frozen=True, eq=False)
class Reconstruct(SplitStage):
    """Every picture encoded and decoded, in batches of one fixed shape."""

    NAME = "reconstruct"

    images: Pictures | FolderPictures | Prepared
    first_stage: FileStage

    def rows(self, inputs: Folders) -> list[Asked]:
        """Return what is known of the pictures, in order."""
        rows = self.images.rows(inputs)
        return [{**row, "file": f"{i:06d}.png"} for i, row in enumerate(rows)]

    def parts(self, inputs: Folders, machine: Machine) -> Sequence[str]:
        """Name the file of every batch."""
        count, size = batches(len(self.images.rows(inputs)), machine)
        return [f"batch-{size}-{i:05d}.json" for i in range(count)]

    def beside(self, i: int, inputs: Folders, machine: Machine) -> Sequence[str]:
        """Name the pictures of a batch; one that could not be read is not there."""
        rows, names = self.rows(inputs), self.parts(inputs, machine)
        return [rows[k]["file"] for k in json.loads((inputs[self] / names[i]).read_text())]

    def open(
        self, folder: Path, inputs: Folders, machine: Machine, log: Log
    ) -> Callable[[int], None]:
        """Load the first stage."""
        import torch

        from experiments.report.pictures import save_png, to_uint8
        from lightning_modules.registry import load_first_stage

        first_stage = load_first_stage(self.first_stage.file(inputs), machine.device)
        read = self.images.reader(inputs, machine)
        rows, names = self.rows(inputs), self.parts(inputs, machine)
        size = batches(len(rows), machine)[1]

        @torch.inference_mode()
        def make(i: int) -> None:
            images, asked = read(i * size, (i + 1) * size)
            if isinstance(images, list):
                raise ValueError("a first stage takes pictures of one size; give --resolution")
            filled = torch.cat([images, images[-1:].expand(size - len(images), -1, -1, -1)])
            pixels = (filled.float() / 127.5 - 1).to(machine.device)
            made = to_uint8(first_stage.decode(first_stage.encode(pixels)).cpu())
            for row, picture in zip(asked, made, strict=False):
                save_png(folder / rows[row["index"]]["file"], picture)
            write_json(folder / names[i], [row["index"] for row in asked])

        return make

    def finish(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        """Count those that could be read."""
        parts = range(len(self.parts(inputs, machine)))
        return {"pictures": sum(len(self.beside(i, inputs, machine)) for i in parts)}

    def reader(
        self, inputs: Folders, machine: Machine
    ) -> Callable[[int, int], tuple[Tensor, list[Asked]]]:
        """Return what reads reconstructions [first, last): uint8 [B, 3, H, W], and their rows."""
        return png_reader(inputs[self], self.rows(inputs))

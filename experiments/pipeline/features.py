"""Rows per picture: what a classifier, a feature network or a first stage says of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.files import write_json
from experiments.pipeline.data import Asked, Pictures
from experiments.pipeline.edit import Edits
from experiments.pipeline.given import FolderPictures, Prepared
from experiments.pipeline.reconstruct import Reconstruct
from experiments.pipeline.sample import Sample
from experiments.pipeline.stage import FileStage, Folders, Log, Machine, SplitStage


@dataclass(frozen=True, eq=False)
class Features(SplitStage):
    """What an extractor of eval/ makes of pictures, batch by batch; no set is ever in memory."""

    images: Sample | Reconstruct | Pictures | FolderPictures | Prepared | Edits
    extractor: Any
    """A frozen dataclass of eval/, see `eval.rows.Extractor`."""
    first_stage: FileStage | None = None
    """For extractors that reconstruct."""

    @property
    def name(self) -> str:
        """Name of the stage."""
        return f"features-{self.images.name}"

    @property
    def follows(self) -> SplitStage | None:
        """The pictures that are being made, batch by batch."""
        source = self.images.source if isinstance(self.images, Prepared) else self.images
        return source if isinstance(source, SplitStage) else None

    def parts(self, inputs: Folders, machine: Machine) -> Sequence[str]:
        """Name the file of every batch."""
        count, size = len(self.images.rows(inputs)), machine.batch_size
        return [f"rows-{size}-{i:05d}.safetensors" for i in range(-(-count // size))]

    def open(
        self, folder: Path, inputs: Folders, machine: Machine, log: Log
    ) -> Callable[[int], None]:
        """Load the extractor."""
        import numpy as np

        from eval.rows import save_measured
        from lightning_modules.registry import load_first_stage

        first_stage = None
        if self.first_stage is not None:
            first_stage = load_first_stage(self.first_stage.file(inputs), machine.device)
        extract = self.extractor.load(
            machine.device, folder=machine.classifiers, first_stage=first_stage
        )
        read = self.images.reader(inputs, machine)
        names, size = self.parts(inputs, machine), machine.batch_size

        def make(i: int) -> None:
            images, asked = read(i * size, (i + 1) * size)
            measured = extract(images, asked, i * size)
            index = np.array([row["index"] for row in asked], np.int64)
            rows = {**measured.rows, "index": index}
            save_measured(folder / names[i], replace(measured, rows=rows))

        return make

    def finish(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        """Say which files hold the rows, in order."""
        names = list(self.parts(inputs, machine))
        write_json(folder / "rows.json", names)
        # of a small set no picture may be left to be a reference, which scores allow for
        there, wanted = len(self.measured(inputs)[0]) if names else 0, self.count(inputs)
        if there < wanted:
            log.note(f"{wanted - there} of {wanted} pictures could not be read and are left out")
        return {"batches": len(names), "pictures": there}

    def measured(self, inputs: Folders) -> tuple[Any, list[Asked]]:
        """Return all rows, and what was asked of the pictures they are of."""
        import json

        from eval.rows import load_measured

        folder = inputs[self]
        found = load_measured([folder / n for n in json.loads((folder / "rows.json").read_text())])
        rows = self.images.rows(inputs)
        return found, [rows[i] for i in found.rows["index"].tolist()]

    def count(self, inputs: Folders) -> int:
        """Return how many pictures there are, or should be."""
        return len(self.images.rows(inputs))

"""First stages as files: a finished one that a run names, and statistics of an autoencoder's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.view import View
from experiments.pipeline.data import Shards
from experiments.pipeline.stage import FileStage, Folders, Log, Machine

MEASURED = 10_000  # pictures behind the statistics of latents, as in LDMAE's released code


@dataclass(frozen=True, eq=False)
class Given(FileStage):
    """A finished tokenizer or autoencoder; it stays where it is."""

    NAME = "given-{paper}"

    path: Path
    paper: str
    """What it must be."""

    def run(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        """Speak up where the file is none."""
        from lightning_modules.registry import load_first_stage

        load_first_stage(self.path, "cpu", self.paper)
        return {"from": str(self.path)}

    def file(self, inputs: Folders) -> Path:
        """Path of the file."""
        return self.path


@dataclass(frozen=True, eq=False)
class Statistics(FileStage):
    """An autoencoder whose latents are normalised by the statistics of this run's pictures."""

    VERSION = 2

    autoencoder: FileStage
    shards: Shards
    view: View
    count: int
    """Pictures that are measured, at most MEASURED."""
    seed: int

    def run(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        """Measure, and write the autoencoder with its statistics."""
        import torch

        from data.view import Order
        from data.webdata import WebData
        from lightning_modules.common.checkpoint import save_weights
        from lightning_modules.common.seeding import mix_seed
        from lightning_modules.registry import load_first_stage

        module = load_first_stage(self.autoencoder.file(inputs), machine.device)
        size = machine.batch_size
        log.note(f"statistics of the latents of {self.count} training pictures")
        # in one process and order, whatever the machine
        web = WebData(
            self.shards.shards(inputs),
            None,
            self.view,
            Order(workers=0, shuffle_buffer=1000),
            batch_size=size,
            seed=self.seed,
            epoch_batches=-(-self.count // size),
            max_skipped=machine.max_skipped,
        )
        generator = torch.Generator().manual_seed(mix_seed(self.seed, 0))
        images = (batch["image"] for batch in web.stream())
        module.measure(images, self.count, generator)
        save_weights(folder / "autoencoder.safetensors", *module.export())
        return {"pictures": self.count}

    def file(self, inputs: Folders) -> Path:
        """Path of the file."""
        return inputs[self] / "autoencoder.safetensors"

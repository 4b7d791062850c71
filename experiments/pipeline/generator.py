"""A trained generator with all that it is sampled with, as one folder of links."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.files import file_hash, link, write_json
from experiments.pipeline.stage import FileStage, Folders, Log, Machine, Stage
from experiments.pipeline.train import Train

CHECKPOINT = "checkpoint.safetensors"
ABOUT = "checkpoint.json"


@dataclass(frozen=True, eq=False)
class Generator(Stage):
    """The files of a generator side by side; nothing is copied or rewritten."""

    train: Train
    first_stage: FileStage
    first_name: str = "tokenizer"
    """What the first stage is."""
    parts: Mapping[str, Train] = field(default_factory=dict)
    """Trainings of further parts, by the names that the paper gives them."""
    further: Mapping[str, FileStage] = field(default_factory=dict)
    """Further first stages, by the names that the paper gives them."""

    def run(self, folder: Path, inputs: Folders, machine: Machine, log: Log) -> dict[str, Any]:
        """Link the files, and say which is what."""
        link(self.train.file(inputs), folder / CHECKPOINT)
        named = {
            "parts": {k: _named(k, s, folder, inputs) for k, s in self.parts.items()},
            "further": {k: _named(k, s, folder, inputs) for k, s in self.further.items()},
        }
        first = _named(self.first_name, self.first_stage, folder, inputs)
        about = {"first_stage": first, **{k: v for k, v in named.items() if v}}
        write_json(folder / ABOUT, about)
        return about

    def trainings(self, part: str = "") -> list[Train]:
        """Return the trainings whose networks draw a part's pictures; the base's come first."""
        return [self.train, *([self.parts[part]] if part else [])]

    def load(self, inputs: Folders, machine: Machine) -> Any:
        """Return the module, frozen and ready to sample."""
        from lightning_modules.registry import load_generator

        return load_generator(inputs[self], device=machine.device)


def _named(name: str, stage: FileStage, folder: Path, inputs: Folders) -> dict[str, str]:
    target = folder / f"{name}.safetensors"
    link(stage.file(inputs), target)
    return {"file": target.name, "sha256": file_hash(target)}

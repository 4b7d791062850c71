"""A checkpoint that a command line names: its files, its module, and what words change of it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from experiments.cli import blame, first_line
from experiments.papers.registry import PAPERS
from experiments.pipeline.generator import CHECKPOINT
from experiments.settings import ConfigError, override, resolved

if TYPE_CHECKING:
    import torch

    from lightning_modules.common.generator import GeneratorModule

# what may differ from the training because it says where files lie on this machine
PLACES = ("text.path", "text.clip_pretrained")


def find_device(name: str) -> torch.device:
    """Find the device of that name; auto is a GPU, of several ranks each its own, or the CPU.

    Raises:
        ConfigError: this machine has no such device.
    """
    import torch

    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device(
            "cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        )
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {name}: {first_line(error)}") from error
    return device


def load(
    path: Path, tokenizer: Path | None, device: torch.device | str, paper: str | None = None
) -> GeneratorModule:
    """Load the generator of a run folder or file.

    Raises:
        ConfigError: a missing file, or one of another kind.
    """
    from lightning_modules.registry import load_generator

    file = checkpoint_file(path)
    if tokenizer is not None and not tokenizer.is_file():
        raise ConfigError(f"there is no tokenizer {tokenizer}")
    try:
        return load_generator(file, tokenizer, device, paper)
    except KeyError as error:  # the settings lack the tokenizer that the file was trained on
        raise ConfigError(
            f"{file} names no {first_line(error)}: it comes from the middle of a training; "
            f"take the run folder's {CHECKPOINT}"
        ) from error
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(first_line(error)) from error
    except (SafetensorError, UnpicklingError, EOFError, OSError, RuntimeError) as error:
        raise ConfigError(blame(file, error, "is no readable checkpoint")) from error


def checkpoint_file(path: Path) -> Path:
    """Return the checkpoint of a run folder, be it a first stage's; a file is one itself."""
    names = [CHECKPOINT, *(f"{cls.FIRST_STAGE.section}.safetensors" for cls in PAPERS.values())]
    if not path.is_dir():
        return path
    return next((path / name for name in names if (path / name).is_file()), path / CHECKPOINT)


def read_settings(module: GeneratorModule, words: Sequence[str]) -> Any:
    """Apply `key=value` words: those of sampling are returned, those of PLACES take effect.

    Raises:
        ConfigError: an unknown setting, one out of range, or one that is fixed by the training.
    """
    text, sampling = module.config.text, module.config.sampling
    paper = module.hparams["config"].get("paper")
    presets = PAPERS[paper].PRESETS.get("sampling", {}) if paper in PAPERS else {}
    holder = dataclasses.make_dataclass(
        "Settings",
        [
            ("sampling", type(sampling), field(default_factory=lambda: sampling)),
            ("text", type(text), field(default_factory=lambda: text)),
        ],
        namespace={"PRESETS": {"sampling": presets}},
    )
    changed = override(holder(), words)
    for name, value in resolved(changed.text).items():
        if value == getattr(text, name):
            continue
        if f"text.{name}" not in PLACES:
            raise ConfigError(
                f"text.{name} is part of the checkpoint; of text only "
                f"{' and '.join(PLACES)} can be changed"
            )
        setattr(text, name, value)  # the encoder reads it when it is first used
    return changed.sampling


def checkpoint_files(path: Path, tokenizer: Path | None = None) -> tuple[tuple[Path, ...], Path]:
    """Return the files that a generator's checkpoint works with, and its first stage among them.

    Args:
        path: the checkpoint's file.
        tokenizer: its first stage, where it is not the one that is named beside it.

    Raises:
        ConfigError: nothing names its first stage, or a file is not there.
    """
    with safe_open(path, "np") as weights:
        config = json.loads((weights.metadata() or {}).get("config", "{}"))
    side = path.with_suffix(".json")
    beside = json.loads(side.read_text()) if side.is_file() else {}
    named = beside.get("first_stage", config.get("first_stage", config.get("tokenizer")))
    if tokenizer is None and not isinstance(named, dict):
        raise ConfigError(f"nothing beside {path} names its first stage; give --tokenizer")
    first = tokenizer or path.parent / named["file"]
    others = [*beside.get("parts", {}).values(), *beside.get("further", {}).values()]
    files = (first, *(path.parent / other["file"] for other in others))
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{path} needs {file}, which is not there")
    return files, first

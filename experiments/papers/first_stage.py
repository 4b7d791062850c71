"""Kinds of first stages, and what a first stage's settings or file say of it."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


@dataclass(frozen=True)
class FirstStageKind:
    """A kind of first stage, as papers name it."""

    section: str
    """The section of a generator's run that holds it."""
    paper: str
    """The paper that trains it alone, and the folder of its YAMLs."""
    config: type
    """The settings of its module."""
    presets: Mapping[str, Mapping[str, Any]]
    """Section of these -> name -> settings."""
    measures: Callable[[Any], tuple[int, int | None, int | None]]
    """Settings of the module -> factor, number of codes, channels of latents."""
    files: tuple[str, ...] = ()
    """Settings that name files which its training reads."""
    statistics: bool = False
    """Whether the statistics of its latents are those of a run's own pictures."""


def shipped_folder(kind: FirstStageKind) -> str:
    """Return the folder of lightning_modules that holds a kind's module and shipped files."""
    return kind.config.__module__.split(".")[1]


def measures_of(kind: FirstStageKind, section: Any) -> tuple[int, int | None, int | None] | None:
    """Return factor, codes and channels of the first stage of a section; None where unknown."""
    if section.ckpt in (None, "shipped"):
        return kind.measures(section)
    return measures_of_file(kind, Path(section.ckpt))


def measures_of_file(kind: FirstStageKind, path: Path) -> tuple[int, int | None, int | None] | None:
    """Read the same from a file's settings, without its tensors; None where it has none."""
    from lightning_modules.common.settings import build

    try:
        with safe_open(path, "np") as file:
            config = json.loads((file.metadata() or {})["config"])
        if config["paper"] != kind.paper:
            return None
        names = {f.name for f in dataclasses.fields(kind.config)}
        return kind.measures(build(kind.config, {k: v for k, v in config.items() if k in names}))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None  # it is refused, with its reason, when it is read


def tokens_of(path: Path) -> str | None:
    """Return the sha256 of the tokenizer whose tokens a file decodes, None where it is its own."""
    try:
        with safe_open(path, "np") as file:
            return json.loads((file.metadata() or {})["config"]).get("tokens_of")
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError):
        return None

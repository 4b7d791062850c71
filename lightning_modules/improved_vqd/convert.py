"""Official Improved VQ-Diffusion checkpoints; the layouts are those of VQ-Diffusion."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_modules.common.foreign import Foreign, Settings
from lightning_modules.vq_diffusion.convert import read_parts


def read(source: Path, hints: Mapping[str, Any]) -> Foreign:
    """Read a checkpoint of either paper; without a learnable null the guidance is zero-shot."""
    official, found = read_parts(source, hints)
    condition = official.model["condition"]
    more: Settings = [("null_condition.name", "learned" if official.learnable else "empty")]
    state = dict(found.state)
    if official.null is not None:
        state["null"] = official.null
        more.append(("null_condition.length", len(official.null)))
    if condition != "text":  # the released code has no purity sampling for these
        more.append(("sampling.order", "diffusion"))
    if condition == "class":  # README of the released code
        more += [("sampling.guidance", 1.5), ("sampling.truncation", 0.94)]
    elif source.is_dir():
        more.append(("sampling.guidance", 5.0))
    defaults = [*found.defaults, *more]
    return replace(found, what="Improved VQ-Diffusion", defaults=defaults, state=state)

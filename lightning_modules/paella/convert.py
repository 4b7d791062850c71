"""Official Paella checkpoints -> this suite's networks. Sizes are read from the tensors' shapes.

paella_v3.pt and checkpoints of its training code, model_600000.pt (v1), prior_v1.pt. Our parameter
names are the released ones, so converting means: know what the file is, infer its settings, and
check every key.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lightning_modules.common.checkpoint import load_foreign
from lightning_modules.common.foreign import (
    Foreign,
    Settings,
    check_types,
    count,
    fitted,
    section,
    shape,
    typed,
)
from lightning_modules.common.settings import plain
from lightning_modules.paella.config import PRESETS, ModelConfig, PriorConfig, V1Config
from lightning_modules.paella.network import Paella
from lightning_modules.paella.network_v1 import DenoiseUNet
from lightning_modules.paella.prior import Prior

Kind = Literal["v3", "v1", "prior"]
NETWORKS = {
    "v3": (Paella, ModelConfig),
    "v1": (DenoiseUNet, V1Config),
    "prior": (Prior, PriorConfig),
}
HINTS = ("nhead", "self_attn", "dropout", "c_r")  # what no shape tells
RELEASED_HEADS = 16


def read(source: Path, hints: Mapping[str, Any]) -> Foreign:
    """Read a token predictor of 2023 (v3) or 2022 (v1)."""
    given = {**section(hints, "v1"), **section(hints, "model")}
    kind, tensors, model = convert(load_foreign(source), given)
    if kind == "prior":
        raise ValueError("this is the diffusion prior, which makes no pictures by itself")
    at = "v1" if kind == "v1" else "model"
    settings: Settings = [("network", kind), *((f"{at}.{k}", v) for k, v in model.items())]
    defaults: Settings = []
    if kind == "v1":
        what = "Paella of 2022 (v1)"
        settings.append(("text.name", "open_clip"))
        defaults += [(f"sampling.{k}", v) for k, v in plain(PRESETS["v1"]).items()]
    else:
        what = "Paella's token predictor of 2023 (v3)"
        settings += [] if model["clip_embd"] else [("text.clip", None)]
    own = {f"network.{k}": v for k, v in tensors.items()}
    return Foreign(what, model["num_labels"], settings, defaults, own)


def read_prior(source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a diffusion prior: its tensors, and the settings that `PaellaModule.assemble` takes.

    Raises:
        ValueError: another file.
    """
    kind, tensors, settings = convert(load_foreign(source))
    if kind != "prior":
        raise ValueError(f"this is a token predictor ({kind}), not the diffusion prior")
    return tensors, {"paper": "paella prior", "prior": settings}


def convert(
    state: Mapping[str, Tensor], hints: Mapping[str, Any] | None = None
) -> tuple[Kind, dict[str, Tensor], dict[str, Any]]:
    """Recognise an official state dict and infer its settings.

    Args:
        state: tensors by their released names.
        hints: settings that no shape tells: nhead (v3, default 16 per level with attention),
            self_attn and dropout (v3), c_r (v1, default 64). Others are ignored.

    Returns:
        What it is, our state dict, and the plain settings of its network.
    """
    given = {k: v for k, v in (hints or {}).items() if k in HINTS}
    check_types(ModelConfig, given)
    kind: Kind
    if "byt5_mapper.weight" in state:
        kind, config = "v3", _v3_config(state, given)
    elif "embedding.weight" in state and "clf.weight" in state:
        kind, config = "v1", _v1_config(state, given)
    elif "blocks.0.weight" in state:
        kind, config = "prior", _prior_config(state)
    else:
        raise ValueError(
            "this is no Paella checkpoint: it has neither byt5_mapper.weight (v3), nor "
            "embedding.weight and clf.weight (v1), nor blocks.0.weight (prior)"
        )
    network, settings = NETWORKS[kind]
    what = f"the Paella {kind} checkpoint"
    return kind, fitted(lambda: network(typed(settings, config)), state, what), config


def _block_kind(state: Mapping[str, Tensor], block: str) -> str:
    """C, T, A or F of one block of v3; empty for the convolution between levels."""
    for part, kind in (("depthwise", "C"), ("mapper", "T"), ("kv_mapper.1", "A")):
        if f"{block}.{part}.weight" in state:
            return kind
    return "F" if f"{block}.channelwise.0.weight" in state else ""


def _period(kinds: str) -> str:
    """The shortest string that `kinds` repeats."""
    lengths = (n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0)
    return next((kinds[:n] for n in lengths if kinds[:n] * (len(kinds) // n) == kinds), "")


def _v3_config(state: Mapping[str, Tensor], hints: Mapping[str, Any]) -> dict[str, Any]:
    num_labels, c_in = shape(state, "in_mapper.0.weight", 2)
    c_cond, byt5_embd = shape(state, "byt5_mapper.weight", 2)
    first, patch_width = shape(state, "embedding.1.weight", 4)[:2]
    c_hidden, blocks, level_config = [], [], []
    for level in range(count(state, "down_blocks")):
        prefix = f"down_blocks.{level}"
        names = [f"{prefix}.{i}" for i in range(count(state, prefix))]
        kinds = "".join(_block_kind(state, name) for name in names)
        c_hidden.append(first if level == 0 else shape(state, f"{prefix}.0.1.weight", 4)[0])
        level_config.append(_period(kinds))
        blocks.append(len(kinds) // max(len(level_config[-1]), 1))
    default_heads = [RELEASED_HEADS if "A" in kinds else -1 for kinds in level_config]
    depthwise = [k for k in state if k.endswith("depthwise.weight")]
    timestep = [k for k in state if re.fullmatch(r"(down|up)_.*\d\.mapper\.weight", k)]
    config = {
        "c_in": c_in,
        "c_out": shape(state, "out_mapper.1.weight", 4)[1],
        "num_labels": num_labels,
        "c_r": shape(state, timestep[0], 2)[1] if timestep else hints.get("c_r", ModelConfig.c_r),
        "patch_size": math.isqrt(patch_width // c_in),
        "c_cond": c_cond,
        "c_hidden": c_hidden,
        "nhead": hints.get("nhead", default_heads),
        "blocks": blocks,
        "level_config": level_config,
        "clip_embd": 0,
        "clip_image": "clip_image_mapper.weight" in state,
        "byt5_embd": byt5_embd,
        "kernel_size": shape(state, depthwise[0], 4)[-1] if depthwise else ModelConfig.kernel_size,
        "dropout": hints.get("dropout", ModelConfig.dropout),
        "self_attn": hints.get("self_attn", ModelConfig.self_attn),
    }
    if "clip_mapper.weight" in state:
        width, config["clip_embd"] = shape(state, "clip_mapper.weight", 2)
        config["clip_seq_len"] = width // c_cond
    return config


def _v1_config(state: Mapping[str, Tensor], hints: Mapping[str, Any]) -> dict[str, Any]:
    num_labels, finest = shape(state, "embedding.weight", 2)
    c_r = hints.get("c_r", V1Config.c_r)

    def levels(side: str) -> list[int]:
        """Number of ResBlocks of each level."""
        names = [f"{side}.{level}" for level in range(count(state, side))]
        return [
            sum(f"{name}.{i}.gamma" in state for i in range(count(state, name))) for name in names
        ]

    down = levels("down_blocks")
    return {
        "num_labels": num_labels,
        "c_hidden": finest * 2 ** (len(down) - 1),
        "c_clip": shape(state, "down_blocks.0.0.cond_mapper.weight", 2)[1] - c_r,
        "c_r": c_r,
        "down_levels": down,
        "up_levels": levels("up_blocks"),
    }


def _prior_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    c_hidden, clip_embd = shape(state, "blocks.0.weight", 2)
    return {
        "clip_embd": clip_embd,
        "c_hidden": c_hidden,
        "c_r": shape(state, "blocks.1.0.weight", 2)[1] - clip_embd - c_hidden,
        "num_blocks": count(state, "blocks") - 2,
    }

"""Official Paella checkpoints -> this suite's networks. Sizes are read from the tensors' shapes.

paella_v3.pt and checkpoints of its training code, model_600000.pt (v1), prior_v1.pt. Our parameter
names are the released ones, so converting means: know what the file is, infer its settings, and
check every key. Files are read by `common.checkpoint.load_foreign`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_modules.common.checkpoint import load_strict
from lightning_modules.common.settings import build
from lightning_modules.paella.config import ModelConfig, PriorConfig, V1Config
from lightning_modules.paella.network import Paella
from lightning_modules.paella.network_v1 import DenoiseUNet
from lightning_modules.paella.prior import Prior

Kind = Literal["v3", "v1", "prior"]
NETWORKS = {
    "v3": (Paella, ModelConfig),
    "v1": (DenoiseUNet, V1Config),
    "prior": (Prior, PriorConfig),
}
RELEASED_HEADS = 16


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

    Raises:
        ValueError: if it is none of the three, or a key is missing, left over or of wrong shape.
    """
    hints = hints or {}
    kind: Kind
    if "byt5_mapper.weight" in state:
        kind, config = "v3", _v3_config(state, hints)
    elif "embedding.weight" in state and "clf.weight" in state:
        kind, config = "v1", _v1_config(state, hints)
    elif "blocks.0.weight" in state:
        kind, config = "prior", _prior_config(state)
    else:
        raise ValueError(
            "this is no Paella checkpoint: it has neither byt5_mapper.weight (v3), nor "
            "embedding.weight and clf.weight (v1), nor blocks.0.weight (prior)"
        )
    network, settings = NETWORKS[kind]
    with torch.device("meta"):
        empty = network(build(settings, config))
    load_strict(empty, {k: v.to("meta") for k, v in state.items()}, f"the Paella {kind} checkpoint")
    return kind, dict(state), config


def _shape(state: Mapping[str, Tensor], key: str) -> torch.Size:
    if key not in state:
        raise ValueError(f"the checkpoint lacks {key}")
    return state[key].shape


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered children `prefix` has."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(m[1]) for k in state if (m := pattern.match(k))), default=-1)


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
    num_labels, c_in = _shape(state, "in_mapper.0.weight")
    c_cond, byt5_embd = _shape(state, "byt5_mapper.weight")
    first, patch_width = _shape(state, "embedding.1.weight")[:2]
    c_hidden, blocks, level_config = [], [], []
    for level in range(_count(state, "down_blocks")):
        prefix = f"down_blocks.{level}"
        names = [f"{prefix}.{i}" for i in range(_count(state, prefix))]
        kinds = "".join(_block_kind(state, name) for name in names)
        c_hidden.append(first if level == 0 else _shape(state, f"{prefix}.0.1.weight")[0])
        level_config.append(_period(kinds))
        blocks.append(len(kinds) // max(len(level_config[-1]), 1))
    default_heads = [RELEASED_HEADS if "A" in kinds else -1 for kinds in level_config]
    depthwise = [v for k, v in state.items() if k.endswith("depthwise.weight")]
    timestep = [v for k, v in state.items() if re.fullmatch(r"(down|up)_.*\d\.mapper\.weight", k)]
    config = {
        "c_in": c_in,
        "c_out": _shape(state, "out_mapper.1.weight")[1],
        "num_labels": num_labels,
        "c_r": timestep[0].shape[1] if timestep else hints.get("c_r", ModelConfig.c_r),
        "patch_size": math.isqrt(patch_width // c_in),
        "c_cond": c_cond,
        "c_hidden": c_hidden,
        "nhead": list(hints.get("nhead", default_heads)),
        "blocks": blocks,
        "level_config": level_config,
        "clip_embd": 0,
        "clip_image": "clip_image_mapper.weight" in state,
        "byt5_embd": byt5_embd,
        "kernel_size": depthwise[0].shape[-1] if depthwise else ModelConfig.kernel_size,
        "dropout": hints.get("dropout", ModelConfig.dropout),
        "self_attn": hints.get("self_attn", ModelConfig.self_attn),
    }
    if "clip_mapper.weight" in state:
        width, config["clip_embd"] = _shape(state, "clip_mapper.weight")
        config["clip_seq_len"] = width // c_cond
    return config


def _v1_config(state: Mapping[str, Tensor], hints: Mapping[str, Any]) -> dict[str, Any]:
    num_labels, finest = _shape(state, "embedding.weight")
    c_r = hints.get("c_r", V1Config.c_r)

    def levels(side: str) -> list[int]:
        """Number of ResBlocks of each level."""
        names = [f"{side}.{level}" for level in range(_count(state, side))]
        return [
            sum(f"{name}.{i}.gamma" in state for i in range(_count(state, name))) for name in names
        ]

    down = levels("down_blocks")
    return {
        "num_labels": num_labels,
        "c_hidden": finest * 2 ** (len(down) - 1),
        "c_clip": _shape(state, "down_blocks.0.0.cond_mapper.weight")[1] - c_r,
        "c_r": c_r,
        "down_levels": down,
        "up_levels": levels("up_blocks"),
    }


def _prior_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    c_hidden, clip_embd = _shape(state, "blocks.0.weight")
    return {
        "clip_embd": clip_embd,
        "c_hidden": c_hidden,
        "c_r": _shape(state, "blocks.1.0.weight")[1] - clip_embd - c_hidden,
        "num_blocks": _count(state, "blocks") - 2,
    }

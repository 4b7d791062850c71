"""Official LDMAE checkpoints -> this suite's networks. Sizes are read from the tensors' shapes.

Our parameter names are the released ones, so converting means: take the right entry of the file,
infer its settings, and check every key. Files are read by `common.checkpoint.load_entries`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_modules.common.checkpoint import load_strict
from lightning_modules.common.settings import build
from lightning_modules.ldmae.config import DiTConfig
from lightning_modules.ldmae.network import DiT


def dit_entry(entries: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Choose the tensors to sample with: the average where a file has one, as the released code.

    Args:
        entries: what `load_entries` returns.

    Raises:
        ValueError: none of the entries holds a diffusion model.
    """
    for name in ("ema", "", "model", "state_dict"):
        state = entries.get(name, {})
        # a compiled model's names begin with _orig_mod.
        state = {k.removeprefix("_orig_mod."): v for k, v in state.items()}
        if "x_embedder.proj.weight" in state:
            return state
    raise ValueError(
        "this is no diffusion model of LDMAE or LightningDiT: no entry has x_embedder.proj.weight"
    )


def convert_dit(
    state: Mapping[str, Tensor], hints: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Infer the settings of a released diffusion model.

    Args:
        state: tensors by their released names.
        hints: fields of `DiTConfig`, which go first; no shape tells class_dropout_prob (default:
            0.1, or 0 with a single row of labels) nor, without rotation and qk-norm, num_heads.

    Returns:
        Our state dict, and the plain settings of `DiT`.

    Raises:
        ValueError: a key is missing, left over or of wrong shape.
    """
    config = _dit_config(state) | dict(hints or {})
    rows = _shape(state, "y_embedder.embedding_table.weight")[0]
    config.setdefault("class_dropout_prob", 0.1 if rows > 1 else 0.0)
    config.setdefault("num_classes", rows - (config["class_dropout_prob"] > 0))
    if "num_heads" not in config:
        raise ValueError("the checkpoint does not tell model.num_heads; give it")
    with torch.device("meta"):
        empty = DiT(build(DiTConfig, config))
    load_strict(empty, {k: v.to("meta") for k, v in state.items()}, "the diffusion model")
    return dict(state), config


def _dit_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `DiTConfig` that shapes tell."""
    width, channels, patch, _ = _shape(state, "x_embedder.proj.weight")
    positions = _shape(state, "pos_embed")[1]
    swiglu = "blocks.0.mlp.w3.weight" in state
    hidden = _shape(state, "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight")[1]
    wanted = math.ceil(1.5 * hidden) if swiglu else hidden
    if int(2 / 3 * 4 * width if swiglu else 4 * width) == hidden:
        ratio = 4.0
    else:  # many ratios round to these sizes
        ratio = (wanted + 0.5) / width
    blocks = [int(m[1]) for k in state if (m := re.match(r"blocks\.(\d+)\.", k))]
    config = {
        "input_size": math.isqrt(positions) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": 1 + max(blocks, default=-1),
        "mlp_ratio": ratio,
        "text_width": 0,
        "learn_sigma": _shape(state, "final_layer.linear.weight")[0] > patch**2 * channels,
        "use_qknorm": "blocks.0.attn.q_norm.weight" in state,
        "use_swiglu": swiglu,
        "use_rope": "feat_rope.freqs_cos" in state,
        "use_rmsnorm": "blocks.0.norm1.weight" in state,
        "wo_shift": _shape(state, "blocks.0.adaLN_modulation.1.weight")[0] == 4 * width,
    }
    for key in ("feat_rope.freqs_cos", "blocks.0.attn.q_norm.weight"):
        if key in state:
            config["num_heads"] = width // state[key].shape[-1]
    return config


def _shape(state: Mapping[str, Tensor], key: str) -> torch.Size:
    if key not in state:
        raise ValueError(f"the checkpoint lacks {key}")
    return state[key].shape

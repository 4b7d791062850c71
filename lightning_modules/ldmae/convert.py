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
from lightning_modules.common.settings import build, plain
from lightning_modules.ldmae.config import DiTConfig, ViTConfig
from lightning_modules.ldmae.network import DiT
from lightning_modules.ldmae.vmae import VMAE

RELEASED_HEADS = 12


def convert_vmae(
    state: Mapping[str, Tensor],
    hints: Mapping[str, Any] | None = None,
    statistics: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Turn a released VMAE into what `AutoencoderModule.from_export` takes.

    The position tables are those of the file: at 256 px they were resized in training and do not
    follow the formula. The perceptual loss of a training checkpoint is left out; a file of the
    inference class has no mask token, which then is 0.

    Args:
        state: tensors by their released names.
        hints: what no shape tells: num_heads and decoder_num_heads, 12 each in the released model;
            others are ignored.
        statistics: mean and std of the latents, [1, C, 1, 1] each, as `latents_stats.pt` of the
            released code holds them; without, latents are not normalised.

    Returns:
        The state and the settings of the autoencoder.

    Raises:
        ValueError: a key is missing, left over or of wrong shape.
    """
    own = {k: v.float() for k, v in state.items() if not k.startswith("perceptual_loss.")}
    config = _vit_config(own) | {
        k: v for k, v in (hints or {}).items() if k in ("num_heads", "decoder_num_heads")
    }
    own.setdefault("mask_token", torch.zeros(1, 1, config["decoder_embed_dim"]))
    first = "from_latent.layers.0.weight" if config["down_nonlinear"] else "from_latent.weight"
    channels = _shape(own, first)[1]
    vit = build(ViTConfig, config)
    with torch.device("meta"):
        empty = VMAE(vit, channels)
    load_strict(empty, {k: v.to("meta") for k, v in own.items()}, "the VMAE checkpoint")
    converted = {f"network.{k}": v for k, v in own.items()}
    given = statistics or {"mean": torch.zeros(channels), "std": torch.ones(channels)}
    for name in ("mean", "std"):
        if name not in given or given[name].numel() != channels:
            raise ValueError(f"the statistics of the latents need {name} of {channels} channels")
        converted[f"latent_{name}"] = given[name].flatten().float()
    settings = {"paper": "autoencoder", "kind": "vmae", "channels": channels, "vit": plain(vit)}
    return converted, settings


def _vit_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `ViTConfig` that shapes and names tell."""
    width, _, patch, _ = _shape(state, "patch_embed.proj.weight")
    head = "linear"
    if "decoder_pred.conv_smoother.weight" in state:
        head = "smooth" if "decoder_pred.linear_pred.weight" in state else "conv"
    return {
        "image_size": math.isqrt(_shape(state, "pos_embed")[1]) * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": _blocks(state, "blocks"),
        "num_heads": RELEASED_HEADS,
        "decoder_embed_dim": _shape(state, "decoder_embed.weight")[0],
        "decoder_depth": _blocks(state, "decoder_blocks"),
        "decoder_num_heads": RELEASED_HEADS,
        "mlp_ratio": _shape(state, "blocks.0.mlp.fc1.weight")[0] / width,
        "head": head,
        "down_nonlinear": "to_latent.layers.0.weight" in state,
    }


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


def _blocks(state: Mapping[str, Tensor], name: str) -> int:
    found = [int(m[1]) for k in state if (m := re.match(rf"{name}\.(\d+)\.", k))]
    if not found:
        raise ValueError(f"the checkpoint lacks {name}.0")
    return 1 + max(found)

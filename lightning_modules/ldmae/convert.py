"""Official LDMAE checkpoints -> this suite's networks. Sizes are read from the tensors' shapes.

Our parameter names are the released ones, so converting means: take the right entry of the file,
infer its settings, and check every key.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.common.checkpoint import load_entries, load_foreign
from lightning_modules.common.foreign import (
    Converted,
    Foreign,
    Hints,
    Settings,
    check_types,
    count,
    fitted,
    numbers,
    read_suite,
    section,
    shape,
    typed,
)
from lightning_modules.common.settings import plain
from lightning_modules.ldmae.autoencoder import AutoencoderModule
from lightning_modules.ldmae.config import DiTConfig, ViTConfig
from lightning_modules.ldmae.network import DiT
from lightning_modules.ldmae.vmae import VMAE

RELEASED_HEADS = 12


def read(source: Path, hints: Mapping[str, Any]) -> Foreign:
    """Read the diffusion model of LDMAE, or LightningDiT's; the average where a file has one."""
    tensors, model = convert_dit(dit_entry(load_entries(source)), section(hints, "model"))
    settings: Settings = [(f"model.{k}", v) for k, v in model.items()]
    settings.append(("condition", "label" if model["num_classes"] > 1 else "none"))
    unguided: Settings = [] if model["class_dropout_prob"] else [("sampling.guidance", 1.0)]
    own = {f"network.{k}": v for k, v in tensors.items()}
    what = "LDMAE's diffusion model"
    return Foreign(what, None, settings, unguided, own, side=model["input_size"])


def read_autoencoder(
    source: Path, hints: Mapping[str, Any], aside: Path | None = None
) -> Converted:
    """Read an autoencoder of this suite or a released VMAE.

    Args:
        source: the file.
        hints: settings that a user gave, by dotted keys (vit.X).
        aside: file with mean and std of a released one's latents.
    """
    found = read_suite(source, "autoencoder")
    if found is None:
        statistics = None if aside is None else load_foreign(aside)
        return convert_vmae(load_foreign(source), section(hints, "vit"), statistics)
    if aside is not None:
        raise ValueError(f"{source} has statistics of its own, so {aside} must not be given")
    return AutoencoderModule.from_export(*found).export()


def convert_vmae(
    state: Mapping[str, Tensor],
    hints: Hints = None,
    statistics: Mapping[str, Tensor] | None = None,
) -> Converted:
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
    """
    own = {k: v for k, v in state.items() if not k.startswith("perceptual_loss.")}
    config = _vit_config(own) | {
        k: v for k, v in (hints or {}).items() if k in ("num_heads", "decoder_num_heads")
    }
    own.setdefault("mask_token", torch.zeros(1, 1, config["decoder_embed_dim"]))
    first = "from_latent.layers.0.weight" if config["down_nonlinear"] else "from_latent.weight"
    channels = shape(own, first, 2)[1]
    vit = typed(ViTConfig, config)
    own = fitted(lambda: VMAE(vit, channels), own, "the VMAE checkpoint")
    converted = {f"network.{k}": v for k, v in own.items()}
    given = statistics or {"mean": torch.zeros(channels), "std": torch.ones(channels)}
    for name in ("mean", "std"):
        if name not in given or given[name].numel() != channels:
            raise ValueError(f"the statistics of the latents need {name} of {channels} channels")
        converted[f"latent_{name}"] = numbers(name, given[name].flatten())
    if bool((converted["latent_std"] <= 0).any()):
        raise ValueError("std of the latents must be positive in all channels")
    settings = {"paper": "autoencoder", "kind": "vmae", "channels": channels, "vit": plain(vit)}
    return converted, settings


def _vit_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `ViTConfig` that shapes and names tell."""
    width, _, patch, _ = shape(state, "patch_embed.proj.weight", 4)
    head = "linear"
    if "decoder_pred.conv_smoother.weight" in state:
        head = "smooth" if "decoder_pred.linear_pred.weight" in state else "conv"
    return {
        "image_size": math.isqrt(shape(state, "pos_embed", 3)[1]) * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": count(state, "blocks", 1),
        "num_heads": RELEASED_HEADS,
        "decoder_embed_dim": shape(state, "decoder_embed.weight", 2)[0],
        "decoder_depth": count(state, "decoder_blocks", 1),
        "decoder_num_heads": RELEASED_HEADS,
        "mlp_ratio": shape(state, "blocks.0.mlp.fc1.weight", 2)[0] / width,
        "head": head,
        "down_nonlinear": "to_latent.layers.0.weight" in state,
    }


def dit_entry(entries: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Choose the tensors to sample with: the average where a file has one, as the released code."""
    for name in ("ema", "", "model", "state_dict"):
        state = entries.get(name, {})
        # a compiled model's names begin with _orig_mod.
        state = {k.removeprefix("_orig_mod."): v for k, v in state.items()}
        if "x_embedder.proj.weight" in state:
            return state
    raise ValueError(
        "this is no diffusion model of LDMAE or LightningDiT: no entry has x_embedder.proj.weight"
    )


def convert_dit(state: Mapping[str, Tensor], hints: Hints = None) -> Converted:
    """Infer the settings of a released diffusion model.

    Args:
        state: tensors by their released names.
        hints: fields of `DiTConfig`, which go first; no shape tells class_dropout_prob (default:
            0.1, or 0 with a single row of labels) nor, without rotation and qk-norm, num_heads.
    """
    check_types(DiTConfig, hints or {})
    config = _dit_config(state) | dict(hints or {})
    rows = shape(state, "y_embedder.embedding_table.weight", 2)[0]
    config.setdefault("class_dropout_prob", 0.1 if rows > 1 else 0.0)
    config.setdefault("num_classes", rows - (config["class_dropout_prob"] > 0))
    if "num_heads" not in config:
        raise ValueError("the checkpoint does not tell model.num_heads; give it")
    return fitted(lambda: DiT(typed(DiTConfig, config)), state, "the diffusion model"), config


def _dit_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `DiTConfig` that shapes tell."""
    width, channels, patch, _ = shape(state, "x_embedder.proj.weight", 4)
    positions = shape(state, "pos_embed", 3)[1]
    swiglu = "blocks.0.mlp.w3.weight" in state
    last = "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"
    hidden = shape(state, last, 2)[1]
    wanted = math.ceil(1.5 * hidden) if swiglu else hidden
    if int(2 / 3 * 4 * width if swiglu else 4 * width) == hidden:
        ratio = 4.0
    else:  # many ratios round to these sizes
        ratio = (wanted + 0.5) / width
    config = {
        "input_size": math.isqrt(positions) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": count(state, "blocks"),
        "mlp_ratio": ratio,
        "text_width": 0,
        "learn_sigma": shape(state, "final_layer.linear.weight", 2)[0] > patch**2 * channels,
        "use_qknorm": "blocks.0.attn.q_norm.weight" in state,
        "use_swiglu": swiglu,
        "use_rope": "feat_rope.freqs_cos" in state,
        "use_rmsnorm": "blocks.0.norm1.weight" in state,
        "wo_shift": shape(state, "blocks.0.adaLN_modulation.1.weight", 2)[0] == 4 * width,
    }
    for key, ndim in (("feat_rope.freqs_cos", 2), ("blocks.0.attn.q_norm.weight", 1)):
        if key in state:
            config["num_heads"] = width // shape(state, key, ndim)[-1]
    return config

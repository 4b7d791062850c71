"""Released masked transformers -> this suite's networks: aMUSEd's U-ViT and its open-muse names.

Our parameter names are diffusers' (UVit2DModel), so converting means: know what the file is, give
open-muse's MaskGiTUViT those names, infer the settings from the shapes and check every key.
vqgan/convert.py converts aMUSEd's tokenizer.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.common import foreign
from lightning_modules.common.checkpoint import load_foreign
from lightning_modules.common.foreign import Foreign, Settings
from lightning_modules.common.settings import plain
from lightning_modules.muse.config import PRESETS, UViTConfig
from lightning_modules.muse.uvit import UViT

RELEASED_HEAD_WIDTH = 64

# what no shape tells and config.json does; open-muse's file has the same names
HINTS = (
    "num_attention_heads",
    "block_num_heads",
    "micro_cond_encode_dim",
    "micro_cond_embed_dim",
    "layer_norm_eps",
    "hidden_dropout",
    "attention_dropout",
)

OPEN_MUSE = (
    (r"^cond_embed\.0\.", "cond_embed.linear_1."),
    (r"^cond_embed\.2\.", "cond_embed.linear_2."),
    (r"^(down|up)_blocks\.0\.", r"\1_block."),
    (r"\.(down|up)sample\.0\.", r".\1sample."),
    (r"\.(down|up)sample\.1\.", r".\1sample.conv."),
    (r"(res_blocks\.\d+)\.channelwise\.0\.", r"\1.channelwise_linear_1."),
    (r"(res_blocks\.\d+)\.channelwise\.2\.", r"\1.channelwise_norm."),
    (r"(res_blocks\.\d+)\.channelwise\.4\.", r"\1.channelwise_linear_2."),
    (r"(res_blocks\.\d+)\.adaLN_modulation\.mapper\.", r"\1.cond_embeds_mapper."),
    (r"(res_blocks\.\d+|mlm_layer)\.(norm|layer_norm)\.norm\.", r"\1.\2."),
    (r"(attention_blocks\.\d+)\.attn_layer_norm\.", r"\1.norm1."),
    (r"(attention_blocks\.\d+)\.crossattn_layer_norm\.", r"\1.norm2."),
    (r"(transformer_layers\.\d+)\.attn_layer_norm\.", r"\1.norm1.norm."),
    (r"(transformer_layers\.\d+)\.crossattn_layer_norm\.", r"\1.norm2.norm."),
    (r"(transformer_layers\.\d+)\.ffn\.pre_mlp_layer_norm\.", r"\1.norm3.norm."),
    (r"(transformer_layers\.\d+)\.self_attn_adaLN_modulation\.mapper\.", r"\1.norm1.linear."),
    (r"(transformer_layers\.\d+)\.cross_attn_adaLN_modulation\.mapper\.", r"\1.norm2.linear."),
    (r"(transformer_layers\.\d+)\.ffn\.adaLN_modulation\.mapper\.", r"\1.norm3.linear."),
    (r"\.ffn\.wo\.", ".ff.net.2."),
    (r"\.attention\.(query|key|value|out)\.", r".attn1.\1."),
    (r"\.crossattention\.(query|key|value|out)\.", r".attn2.\1."),
    (r"(attn[12])\.query\.", r"\1.to_q."),
    (r"(attn[12])\.key\.", r"\1.to_k."),
    (r"(attn[12])\.value\.", r"\1.to_v."),
    (r"(attn[12])\.out\.", r"\1.to_out.0."),
)


def read(source: Path, hints: Mapping[str, Any]) -> Foreign:
    """Read aMUSEd's U-ViT: the folder of its pipeline (diffusers' or open-muse's), or it alone."""
    network = source / "transformer" if (source / "transformer").is_dir() else source
    known = foreign.read_settings(network / "config.json")
    tensors, model = convert(load_foreign(network), {**known, **foreign.section(hints, "uvit")})
    settings: Settings = [("network", "uvit"), *((f"uvit.{k}", v) for k, v in model.items())]
    settings += [("superres.enabled", False), ("superres.tokenizer", None), ("critic.layers", 0)]
    settings += [("text.name", "clip")]
    settings += [("text.hidden_state", -2), ("text.unit_norm", False), ("text.projected", True)]
    decoding = plain(PRESETS["amused"])
    defaults = [(f"sampling.{k}", v) for k, v in decoding.items() if not isinstance(v, dict)]
    if "text.pad_id" not in hints:
        words = "tokenizer" if (source / "tokenizer").is_dir() else "text_encoder"
        defaults.append(("text.pad_id", foreign.pad_id(source / words)))
    if (source / "text_encoder").is_dir():
        defaults.append(("text.path", str(source / "text_encoder")))
    # the first is diffusers' folder, the other open-muse's
    tokenizers = [source / name for name in ("vqvae", "vae") if (source / name).is_dir()]
    return Foreign(
        "aMUSEd's U-ViT",
        model["codebook_size"],
        settings,
        defaults,
        {f"network.{k}": v for k, v in tensors.items()},
        tokenizer=tokenizers[0] if tokenizers else None,
        side=foreign.trained_side(known),
    )


def convert(
    state: Mapping[str, Tensor], hints: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Recognise a released U-ViT and infer its settings.

    Args:
        state: tensors by diffusers' or open-muse's names.
        hints: settings that no shape tells (a config.json, or by our names): heads (default: 64
            numbers a head), micro-conditions (five of 256), eps, dropouts. Others are ignored.

    Returns:
        Our state dict and the plain settings of `UViTConfig`.

    Raises:
        ValueError: another file, or a key that is missing, left over or of wrong shape.
    """
    if "down_blocks.0.res_blocks.0.depthwise.weight" in state:
        state = open_muse(state)
    if "down_block.res_blocks.0.depthwise.weight" not in state:
        raise ValueError(
            "this is no U-ViT of aMUSEd or open-muse: it has no "
            "down_block.res_blocks.0.depthwise.weight"
        )
    config = _config(state, hints or {})
    network = foreign.fitted(
        lambda: UViT(foreign.typed(UViTConfig, config)), state, "the U-ViT checkpoint"
    )
    return network, config


def open_muse(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of open-muse's MaskGiTUViT the names of diffusers' UVit2DModel."""
    own = {}
    for key, value in state.items():
        gate = key.replace(".ffn.wi_1.", ".ffn.wi_0.")
        if key != gate:  # the linear half, which comes first in the joint layer
            if gate not in state:
                raise ValueError(f"the checkpoint has {key} without {gate}")
            if value.ndim == 0 or value.shape != state[gate].shape:
                raise ValueError(f"{key} and {gate} must have one shape")
            joint = re.sub(r"\.ffn\.wi_1\.", ".ff.net.0.proj.", key)
            own[joint] = torch.cat(
                [foreign.numbers(key, value), foreign.numbers(gate, state[gate])]
            )
        elif ".ffn.wi_0." not in key:
            for pattern, name in OPEN_MUSE:
                key = re.sub(pattern, name, key)
            own[key] = value
    return own


def _config(state: Mapping[str, Tensor], hints: Mapping[str, Any]) -> dict[str, Any]:
    vocab, in_channels = foreign.shape(state, "embed.embeddings.weight", 2)
    hidden, encoder_hidden = foreign.shape(state, "encoder_proj.weight", 2)
    width = foreign.shape(state, "embed.conv.weight", 4)[0]
    given = {name: hints[name] for name in HINTS if name in hints}
    foreign.check_types(UViTConfig, given)
    micro = given.get("micro_cond_embed_dim", UViTConfig.micro_cond_embed_dim)
    return {
        "hidden_size": hidden,
        "num_hidden_layers": foreign.count(state, "transformer_layers"),
        "num_attention_heads": max(1, hidden // RELEASED_HEAD_WIDTH),
        "intermediate_size": foreign.shape(state, "transformer_layers.0.ff.net.2.weight", 2)[1],
        "in_channels": in_channels,
        "block_out_channels": width,
        "block_num_heads": max(1, width // RELEASED_HEAD_WIDTH),
        "num_res_blocks": foreign.count(state, "down_block.res_blocks"),
        "downsample": "down_block.downsample.conv.weight" in state,
        "vocab_size": vocab,
        "codebook_size": foreign.shape(state, "mlm_layer.conv2.weight", 4)[0],
        "encoder_hidden_size": encoder_hidden,
        "cond_embed_dim": foreign.shape(state, "cond_embed.linear_1.weight", 2)[1] - micro,
        **given,
    }

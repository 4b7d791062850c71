"""Released masked transformers -> this suite's networks: aMUSEd's U-ViT and its open-muse names.

Our parameter names are diffusers' (UVit2DModel), so converting means: know what the file is, give
open-muse's MaskGiTUViT those names, infer the settings from the shapes and check every key. Files
are read by `common.checkpoint.load_foreign`; aMUSEd's tokenizer is converted by vqgan/convert.py.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_modules.common.checkpoint import load_strict
from lightning_modules.common.settings import build
from lightning_modules.muse.config import UViTConfig
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
    with torch.device("meta"):
        empty = UViT(build(UViTConfig, config))
    load_strict(empty, {k: v.to("meta") for k, v in state.items()}, "the U-ViT checkpoint")
    return {k: v.float() for k, v in state.items()}, config


def open_muse(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of open-muse's MaskGiTUViT the names of diffusers' UVit2DModel."""
    own = {}
    for key, value in state.items():
        gate = key.replace(".ffn.wi_1.", ".ffn.wi_0.")
        if key != gate:  # the linear half, which comes first in the joint layer
            if gate not in state:
                raise ValueError(f"the checkpoint has {key} without {gate}")
            joint = re.sub(r"\.ffn\.wi_1\.", ".ff.net.0.proj.", key)
            own[joint] = torch.cat([value, state[gate]])
        elif ".ffn.wi_0." not in key:
            for pattern, name in OPEN_MUSE:
                key = re.sub(pattern, name, key)
            own[key] = value
    return own


def _shape(state: Mapping[str, Tensor], key: str) -> torch.Size:
    if key not in state:
        raise ValueError(f"the checkpoint lacks {key}")
    return state[key].shape


def _count(keys: Iterable[str], prefix: str) -> int:
    """How many numbered children `prefix` has."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(m[1]) for k in keys if (m := pattern.match(k))), default=-1)


def _config(state: Mapping[str, Tensor], hints: Mapping[str, Any]) -> dict[str, Any]:
    vocab, in_channels = _shape(state, "embed.embeddings.weight")
    hidden, encoder_hidden = _shape(state, "encoder_proj.weight")
    width = _shape(state, "embed.conv.weight")[0]
    given = {name: hints[name] for name in HINTS if name in hints}
    micro = given.get("micro_cond_embed_dim", UViTConfig.micro_cond_embed_dim)
    return {
        "hidden_size": hidden,
        "num_hidden_layers": _count(state, "transformer_layers"),
        "num_attention_heads": max(1, hidden // RELEASED_HEAD_WIDTH),
        "intermediate_size": _shape(state, "transformer_layers.0.ff.net.2.weight")[1],
        "in_channels": in_channels,
        "block_out_channels": width,
        "block_num_heads": max(1, width // RELEASED_HEAD_WIDTH),
        "num_res_blocks": _count(state, "down_block.res_blocks"),
        "downsample": "down_block.downsample.conv.weight" in state,
        "vocab_size": vocab,
        "codebook_size": _shape(state, "mlm_layer.conv2.weight")[0],
        "encoder_hidden_size": encoder_hidden,
        "cond_embed_dim": _shape(state, "cond_embed.linear_1.weight")[1] - micro,
        **given,
    }

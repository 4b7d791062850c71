"""Released U-ViTs, by the names of diffusers and of open-muse."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from lightning_modules.common.checkpoint import load_foreign, load_strict
from lightning_modules.common.settings import build
from lightning_modules.muse.config import UVIT_MODELS, UViTConfig
from lightning_modules.muse.convert import convert
from lightning_modules.muse.uvit import UViT

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 11,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "in_channels": 10,
    "block_out_channels": 12,
    "block_num_heads": 3,
    "num_res_blocks": 2,
    "downsample": True,
    "vocab_size": 24,
    "codebook_size": 20,
    "encoder_hidden_size": 10,
    "cond_embed_dim": 6,
    "micro_cond_encode_dim": 4,
    "micro_cond_embed_dim": 20,
    "layer_norm_eps": 1e-5,
}
# config.json of a diffusers folder: more than we read
FOLDER = SMALL | {
    "_class_name": "UVit2DModel",
    "use_bias": False,
    "ln_elementwise_affine": True,
    "upsample": True,
    "sample_size": 32,
}


def released(**changes) -> tuple[UViT, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    network = UViT(UViTConfig(**{**SMALL, **changes})).eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return network, network.state_dict()


def as_open_muse(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give diffusers' tensors the names that open-muse's MaskGiTUViT has."""
    attention = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "out"}
    which = {"attn1": "attention", "attn2": "crossattention"}
    layer = {
        "norm1.norm": "attn_layer_norm",
        "norm1.linear": "self_attn_adaLN_modulation.mapper",
        "norm2.norm": "crossattn_layer_norm",
        "norm2.linear": "cross_attn_adaLN_modulation.mapper",
        "norm3.norm": "ffn.pre_mlp_layer_norm",
        "norm3.linear": "ffn.adaLN_modulation.mapper",
        "ff.net.2": "ffn.wo",
    }
    block = {
        "norm1": "attn_layer_norm",
        "norm2": "crossattn_layer_norm",
        "norm": "norm.norm",
        "channelwise_linear_1": "channelwise.0",
        "channelwise_norm": "channelwise.2",
        "channelwise_linear_2": "channelwise.4",
        "cond_embeds_mapper": "adaLN_modulation.mapper",
    }
    out = {}
    for key, value in state.items():
        name, leaf = key.rsplit(".", 1)
        name = re.sub(r"^(down|up)_block", r"\1_blocks.0", name)
        head, _, tail = name.partition(".")
        inside = re.fullmatch(r"(.*(?:layers|_blocks)\.\d+)\.(attn\d)\.(\S+)", name)
        if tail.endswith("ff.net.0.proj"):
            stem = name.removesuffix("ff.net.0.proj")
            linear, gate = value.chunk(2)
            out[f"{stem}ffn.wi_1.{leaf}"], out[f"{stem}ffn.wi_0.{leaf}"] = linear, gate
            continue
        if inside:
            name = f"{inside[1]}.{which[inside[2]]}.{attention[inside[3]]}"
        elif head == "transformer_layers":
            number, _, part = tail.partition(".")
            name = f"{head}.{number}.{layer[part]}"
        elif found := re.fullmatch(r"(.*\.(?:res|attention)_blocks\.\d+)\.(\S+)", name):
            name = f"{found[1]}.{block.get(found[2], found[2])}"
        elif found := re.fullmatch(r"(.*\.(?:down|up)sample)\.(norm|conv)", name):
            name = f"{found[1]}.0.norm" if found[2] == "norm" else f"{found[1]}.1"
        elif name == "mlm_layer.layer_norm":
            name = "mlm_layer.layer_norm.norm"
        elif head == "cond_embed":
            name = {"linear_1": "cond_embed.0", "linear_2": "cond_embed.2"}[tail]
        out[f"{name}.{leaf}"] = value
    return out


@pytest.mark.parametrize("downsample", [False, True])
@pytest.mark.parametrize("origin", ["diffusers", "open-muse"])
def test_names_and_sizes(origin, downsample):
    network, state = released(downsample=downsample)
    foreign = state if origin == "diffusers" else as_open_muse(state)
    if origin == "open-muse":
        assert not any(k.startswith(("down_block.", "up_block.")) for k in foreign)
        assert len(foreign) == len(state) + SMALL["num_hidden_layers"]
    own, config = convert(foreign, FOLDER)
    assert build(UViTConfig, config) == network.config
    assert own.keys() == state.keys()
    assert all(torch.equal(own[k], state[k]) for k in state)


def test_a_folder_of_half_precision(tmp_path):
    network, state = released()
    save_file(
        {k: v.half() for k, v in state.items()}, tmp_path / "diffusion_pytorch_model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(FOLDER))
    own, config = convert(
        load_foreign(tmp_path), json.loads((tmp_path / "config.json").read_text())
    )
    other = UViT(build(UViTConfig, config))
    load_strict(other, own, "the folder")
    assert all(v.dtype == torch.float32 for v in own.values())
    assert other.config == network.config


def test_without_settings_the_released_are_taken():
    with torch.device("meta"):
        state = UViT(UVIT_MODELS["amused-512"]).state_dict()
    _, config = convert(state)
    assert build(UViTConfig, config) == UVIT_MODELS["amused-512"]
    with torch.device("meta"):
        smaller = as_open_muse(UViT(UVIT_MODELS["amused-256"]).state_dict())
    assert build(UViTConfig, convert(smaller)[1]) == UVIT_MODELS["amused-256"]


def test_left_over_missing_and_misshapen_tensors_are_named():
    _, state = released()
    with pytest.raises(ValueError, match=r"left over.*encoder_proj\.bias"):
        convert({**state, "encoder_proj.bias": torch.zeros(16)}, FOLDER)
    for key in ("mlm_layer.conv1.weight", "transformer_layers.3.norm3.norm.weight"):
        with pytest.raises(ValueError, match=re.escape(key)):
            convert({k: v for k, v in state.items() if k != key}, FOLDER)
    bent = {**state, "up_block.res_blocks.1.channelwise_norm.gamma": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"of wrong shape.*gamma"):
        convert(bent, FOLDER)
    with pytest.raises(ValueError, match="lacks encoder_proj"):
        convert({k: v for k, v in state.items() if k != "encoder_proj.weight"}, FOLDER)
    half = as_open_muse(state)
    del half["transformer_layers.2.ffn.wi_0.weight"]
    with pytest.raises(ValueError, match=r"wi_1\.weight without .*wi_0"):
        convert(half, FOLDER)
    half = as_open_muse(state)
    del half["transformer_layers.2.ffn.wi_1.weight"]
    with pytest.raises(ValueError, match=r"missing.*transformer_layers\.2\.ff\.net\.0\.proj"):
        convert(half, FOLDER)


def test_another_network_is_refused():
    with pytest.raises(ValueError, match="no U-ViT of aMUSEd or open-muse"):
        convert({"conv_in.weight": torch.zeros(1)})


def test_settings_that_do_not_fit_are_refused():
    _, state = released()
    with pytest.raises(ValueError, match="num_attention_heads must divide hidden_size"):
        convert(state, FOLDER | {"num_attention_heads": 5})
    with pytest.raises(ValueError, match="cond_embed_dim"):
        convert(state)  # 1280 released micro-conditions do not fit these sizes

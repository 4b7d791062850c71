"""Foreign layouts in, one tokenizer out; anything left over is an error."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_modules.vqgan import convert
from lightning_modules.vqgan.module import VQGANModule

SMALL = {
    "ch": 8,
    "ch_mult": [1, 2, 3],
    "num_res_blocks": 2,
    "attn_resolutions": [64],
    "z_channels": 4,
    "embed_dim": 3,
    "num_codes": 10,
    "norm_groups": 4,
}
HINTS = {"norm_groups": 4}


def tokenizer(**changes: Any) -> VQGANModule:
    torch.manual_seed(0)
    model = VQGANModule({"model": SMALL | changes, "objective": {"disc_weight": 0.0}}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def same(ours: VQGANModule, state: dict[str, Tensor], hints: dict | None = None) -> VQGANModule:
    """Convert `state` and check that the result works as `ours` does."""
    other = VQGANModule.from_export(*convert.convert(state, hints))
    image = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    tokens = other.encode(image)
    assert len(tokens.unique()) > 1
    assert torch.equal(tokens, ours.encode(image))
    assert torch.equal(other.decode(tokens), ours.decode(tokens))
    return other


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attn_resolutions": []},
        {"attn_resolutions": [256, 64]},
        {"attn_resolutions": [], "attn_type": "none"},
        {"ch_mult": [2, 1], "num_res_blocks": 1, "attn_resolutions": [128]},
        {"quantizer": "gumbel", "embed_dim": 4},
    ],
)
def test_taming_sizes_come_from_shapes(changes: dict) -> None:
    ours = tokenizer(**changes)
    state, _ = ours.export()
    model = same(ours, state, HINTS | {"sample_tokens": False}).config.model
    for name, value in (SMALL | changes).items():
        assert getattr(model, name) == value, name
    assert model.legacy_beta == (model.quantizer == "nearest")


def test_what_else_taming_and_ldm_files_hold_is_dropped() -> None:
    ours = tokenizer()
    state, _ = ours.export()
    extra = {
        "loss.discriminator.main.0.weight": torch.zeros(1),
        "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1),
        "model_ema.decay": torch.zeros(()),
        "model_ema.encoderconv_inweight": torch.zeros(1),
    }
    same(ours, {**state, **extra}, HINTS)
    inside = {f"first_stage_model.{k}": v for k, v in {**state, **extra}.items()}
    same(ours, inside | {"transformer.tok_emb.weight": torch.zeros(2, 2)}, HINTS)
    same(ours, {k: v.double() for k, v in state.items()}, HINTS)


def inside_vq_diffusion(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tokenizer as its encoder and decoder stand in a VQ-Diffusion's file."""
    halves = {}
    for key, value in state.items():
        if not key.startswith(("decoder.", "post_quant_conv.")):
            halves[f"content_codec.enc.{key}"] = value
        if not key.startswith(("encoder.", "quant_conv.")):
            halves[f"content_codec.dec.{key}"] = value
    return {**halves, "transformer.transformer.to_logits.1.bias": torch.zeros(3)}


def test_the_tokenizer_of_a_vq_diffusion_file() -> None:
    ours = tokenizer()
    state, _ = ours.export()
    whole = inside_vq_diffusion(state)
    same(ours, whole, HINTS)
    with pytest.raises(ValueError, match=r"another quantize\.embedding\.weight"):
        convert.convert({**whole, "content_codec.dec.quantize.embedding.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"odd"):
        convert.convert({**whole, "content_codec.enc.odd": torch.zeros(1)}, HINTS)
    # ITHQ: one codec, whose codes are a buffer with running statistics
    ithq = {f"content_codec.{k}": v for k, v in state.items() if k != "quantize.embedding.weight"}
    codes = state["quantize.embedding.weight"]
    ithq |= {
        "content_codec.quantize.embedding": codes,
        "content_codec.quantize.cluster_size": torch.zeros(len(codes)),
        "content_codec.quantize.embedding_avg": torch.zeros_like(codes),
    }
    same(ours, ithq, HINTS)


def test_kept_codes_of_a_taming_file() -> None:
    ours = tokenizer(used_codes=4)
    ours.autoencoder.quantize.used.copy_(torch.tensor([9, 2, 5, 0]))
    state, _ = ours.export()
    other = same(ours, state, HINTS | {"unknown_index": "extra"})
    assert other.num_codes == 5 and other.codebook().shape == (5, 3)
    given = VQGANModule.from_export(*convert.convert(state, HINTS | {"unknown_index": 2}))
    assert given.num_codes == 4 and given.config.model.unknown_id == 2


@pytest.mark.parametrize("wrong", [-1, 10])
def test_kept_codes_that_are_none_are_refused(wrong: int) -> None:
    state, _ = tokenizer(used_codes=2).export()
    state["quantize.used"] = torch.tensor([0, wrong])
    with pytest.raises(ValueError, match=r"quantize\.used must name codes from 0 to 9"):
        convert.convert(state, HINTS)


def diffusers(state: dict[str, Tensor], levels: int, old: bool) -> dict[str, Tensor]:
    """Rename our state as diffusers' VQModel has it, new or old attention names."""
    names = ("query", "key", "value", "proj_attn") if old else ("to_q", "to_k", "to_v", "to_out.0")
    out = {}
    for key, value in state.items():
        key = re.sub(r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets.", key)
        key = re.sub(r"\.down\.(\d+)\.attn\.", r".down_blocks.\1.attentions.", key)
        key = re.sub(r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0.", key)
        for i in range(levels):
            key = key.replace(f".up.{i}.block.", f".up_blocks.{levels - 1 - i}.resnets.")
            key = key.replace(f".up.{i}.attn.", f".up_blocks.{levels - 1 - i}.attentions.")
            key = key.replace(f".up.{i}.upsample.", f".up_blocks.{levels - 1 - i}.upsamplers.0.")
        key = key.replace(".mid.attn_1.", ".mid_block.attentions.0.")
        key = key.replace(".mid.block_1.", ".mid_block.resnets.0.")
        key = key.replace(".mid.block_2.", ".mid_block.resnets.1.")
        key = key.replace(".nin_shortcut.", ".conv_shortcut.")
        key = key.replace(".norm_out.", ".conv_norm_out.")
        if ".attentions." in key:
            for ours, theirs in zip(("q", "k", "v", "proj_out"), names, strict=True):
                key = key.replace(f".{ours}.", f".{theirs}.")
            key = key.replace(".norm.", ".group_norm.")
            value = value[:, :, 0, 0] if value.ndim == 4 else value
        out[key] = value.contiguous()
    return out


@pytest.mark.parametrize("old", [False, True], ids=["new names", "old names"])
@pytest.mark.parametrize("middle", ["vanilla", "none"])
def test_a_diffusers_folder_of_vqmodel(tmp_path: Path, old: bool, middle: str) -> None:
    ours = tokenizer(attn_resolutions=[64] if middle == "vanilla" else [], attn_type=middle)
    state, _ = ours.export()
    foreign = diffusers(state, 3, old)
    assert not any(".mid." in k or ".up." in k for k in foreign)
    settings = {"_class_name": "VQModel", "norm_num_groups": 4, "scaling_factor": 0.18215}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(foreign, tmp_path / "diffusion_pytorch_model.safetensors")

    same(ours, foreign, settings)
    exported, config = convert.read(tmp_path, {})
    other = VQGANModule.from_export(exported, config)
    assert all(torch.equal(other.export()[0][k], v) for k, v in state.items())
    assert other.config.model.scale_factor == 1.0


def test_amused_tokenizer_of_diffusers() -> None:
    uneven = {"ch": 4, "ch_mult": [2, 2, 3], "ch_first": 8, "attn_resolutions": []}
    ours = tokenizer(**uneven, attn_type="none", unit_range=True)
    foreign = diffusers(ours.export()[0], 3, False)
    settings = {"norm_num_groups": 4, "lookup_from_codebook": True, "force_upcast": True}
    found = same(ours, foreign, settings).config.model
    assert {name: getattr(found, name) for name in uneven} == uneven
    assert found.unit_range and found.legacy_beta
    assert not same(tokenizer(**uneven, attn_type="none"), foreign, HINTS).config.model.unit_range
    for told in ({"unit_range": True}, {"_class_name": "VQGANModel"}):  # the latter by open-muse
        assert same(ours, ours.export()[0], HINTS | told).config.model.unit_range


def test_images_of_a_unit_range_network_are_in_the_suites_range() -> None:
    own, other = tokenizer(), tokenizer(unit_range=True)
    image = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert torch.equal(other.latents(image), own.latents((image + 1) / 2))
    codes = other.autoencoder.quantize.lookup(other.encode(image))
    assert torch.equal(other.decode_codes(codes), own.decode_codes(codes) * 2 - 1)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_paella_files_of_every_origin(tmp_path: Path, levels: int) -> None:
    sizes = {"levels": levels, "c_hidden": 16, "c_latent": 4, "bottleneck_blocks": 3}
    ours = tokenizer(network="paella", scale_factor=0.3764, **sizes)
    own, _ = ours.export()
    for name in ("codebook", "embedding"):
        state = {k.replace("quantize.embedding", f"vquantizer.{name}"): v for k, v in own.items()}
        other = same(ours, state)
        found = dataclasses.asdict(other.config.model)
        assert found | sizes | {"num_codes": SMALL["num_codes"], "scale_factor": 0.3764} == found
        assert other.factor == 2**levels
    (tmp_path / "config.json").write_text(json.dumps({"scale_factor": 0.5, "levels": levels}))
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    assert convert.read(tmp_path, {})[1]["model"]["scale_factor"] == 0.5
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "f4.pt")
    assert convert.read(tmp_path / "f4.pt", {})[1]["model"]["scale_factor"] == 0.3764


def test_left_over_missing_and_misshapen_tensors_are_named() -> None:
    state, _ = tokenizer().export()
    with pytest.raises(ValueError, match=r"encoder\.extra"):
        convert.convert({**state, "encoder.extra": torch.zeros(1)}, HINTS)
    with pytest.raises(ValueError, match=r"colorize"):
        convert.convert({**state, "colorize": torch.zeros(1)}, HINTS)
    short = {k: v for k, v in state.items() if k != "decoder.norm_out.bias"}
    with pytest.raises(ValueError, match=r"decoder\.norm_out\.bias"):
        convert.convert(short, HINTS)
    bent = {**state, "decoder.conv_out.bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"decoder\.conv_out\.bias"):
        convert.convert(bent, HINTS)
    with pytest.raises(ValueError, match="layout"):
        convert.convert({"unet.weight": torch.zeros(1)})

"""Official VQ-Diffusion files in every layout; the names here are the released ones."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_modules.common.settings import build, plain
from lightning_modules.common.text import openai_clip_text
from lightning_modules.vq_diffusion.config import ModelConfig
from lightning_modules.vq_diffusion.convert import HF_NULL, convert, load
from lightning_modules.vq_diffusion.network import Denoiser

SIZES = {
    "num_codes": 6,
    "n_layer": 2,
    "n_embd": 8,
    "n_head": 2,
    "spatial_size": [2, 3],
    "diffusion_steps": 5,
    "condition_dim": 16,
}
WIDTH = 64


def ours(**changes) -> Denoiser:
    torch.manual_seed(0)
    network = Denoiser(ModelConfig(**{**SIZES, **changes}))
    for p in network.parameters():
        nn.init.normal_(p)
    return network


def denoiser(network: Denoiser) -> dict[str, Tensor]:
    """The denoiser by its released names, dead buffers included."""
    state, text = dict(network.state_dict()), network.config.condition == "text"
    if text:
        state |= {f"blocks.{i}.attn2.mask": torch.ones(1, 1, 6, 6) for i in range(2)}
    return state if text else {k.replace(".attn1.", ".attn."): v for k, v in state.items()}


def diffusion(network: Denoiser, null: bool = False) -> dict[str, Tensor]:
    """The DiffusionTransformer: the `ema` entry of a training file."""
    steps = network.config.diffusion_steps
    state = {f"log_{name}": torch.zeros(steps) for name in ("at", "bt", "ct", "1_min_ct")}
    for name in ("cumprod_at", "cumprod_bt", "cumprod_ct", "1_min_cumprod_ct"):
        state[f"log_{name}"] = torch.zeros(steps + 1)
    masked = torch.linspace(0.1, 0.9, steps).log()
    state["log_cumprod_ct"] = torch.cat([masked, torch.tensor([-torch.inf])])
    state |= {name: torch.full((steps,), 3.0) for name in ("Lt_history", "Lt_count")}
    if null:
        state["empty_text_embed"] = torch.randn(4, network.config.condition_dim).double()
    return state | {f"transformer.{k}": v for k, v in denoiser(network).items()}


def clip() -> dict[str, Tensor]:
    """A text transformer by OpenAI's names with the released precision."""
    layer = "transformer.resblocks.0"
    shapes = {
        "positional_embedding": (4, WIDTH),
        "token_embedding.weight": (9, WIDTH),
        "text_projection": (WIDTH, 5),
        f"{layer}.attn.in_proj_weight": (3 * WIDTH, WIDTH),
        f"{layer}.attn.in_proj_bias": (3 * WIDTH,),
        f"{layer}.attn.out_proj.weight": (WIDTH, WIDTH),
        f"{layer}.attn.out_proj.bias": (WIDTH,),
        f"{layer}.mlp.c_fc.weight": (4 * WIDTH, WIDTH),
        f"{layer}.mlp.c_fc.bias": (4 * WIDTH,),
        f"{layer}.mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
        f"{layer}.mlp.c_proj.bias": (WIDTH,),
        **{f"{n}.{k}": (WIDTH,) for n in (f"{layer}.ln_1", f"{layer}.ln_2", "ln_final")
           for k in ("weight", "bias")},
    }  # fmt: skip
    return {
        k: torch.randn(s).half() if "proj" in k or "c_fc" in k else torch.randn(s)
        for k, s in shapes.items()
    }


def training_file(network: Denoiser, average: Denoiser, null: bool = False) -> dict:
    """What the released solver writes."""
    text = {f"condition_emb.{k}": v for k, v in clip().items()}
    whole = {**diffusion(network, null), **(text if network.config.condition == "text" else {})}
    return {
        "model": {
            "content_codec.enc.encoder.conv_in.weight": torch.zeros(1),
            **{f"transformer.{k}": v for k, v in whole.items()},
        },
        "ema": {**whole, **diffusion(average, null)},
        "clip_grad_norm": {},
        "optimizer_and_scheduler": {"none": {"optimizer": {"state": {}}}},
        "last_epoch": 3,
        "last_iter": 4,
    }


def same(network: Denoiser, found: dict[str, Tensor]) -> None:
    expected = network.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_a_training_file_gives_its_average(tmp_path: Path) -> None:
    network, average = ours(), ours()
    for p in average.parameters():
        p.data += 1
    path = tmp_path / "coco_learnable.pth"
    torch.save(training_file(network, average, null=True), path)
    state, known = load(path)
    assert known == {}
    found = convert(state, {"n_head": 2})
    assert build(ModelConfig, found.model) == average.config
    same(average, found.network)
    assert found.null is not None and found.null.shape == (4, 16)
    assert found.null.dtype == torch.float32
    assert found.mask_rate == pytest.approx(0.9)
    assert found.statistics.keys() == {"Lt_history", "Lt_count"}
    assert openai_clip_text(found.text).config.num_hidden_layers == 1


def test_a_file_without_average_or_null(tmp_path: Path) -> None:
    network = ours()
    file = training_file(network, network)
    torch.save({"model": file["model"]}, tmp_path / "a.pth")
    torch.save(file["model"], tmp_path / "b.pth")
    for name in ("a.pth", "b.pth"):
        found = convert(load(tmp_path / name)[0], {"n_head": 2})
        same(network, found.network)
        assert found.null is None


@pytest.mark.parametrize("classes", [5, 6], ids=["pretrained", "learnable"])
@pytest.mark.parametrize("class_type", ["adalayernorm", "adainsnorm"])
def test_class_files(classes: int, class_type: str) -> None:
    network = ours(condition="class", class_number=classes, mlp_type="conv_mlp",
                   mlp_hidden_times=3, class_type=class_type)  # fmt: skip
    state = diffusion(network, null=classes == 6)
    for name in ("alpha", "1_min_alpha", "cumprod_alpha", "1_min_cumprod_alpha"):
        state[f"log_{name}"] = torch.zeros(5)
    found = convert(state, {"n_head": 2, "class_type": class_type})
    assert build(ModelConfig, found.model) == ModelConfig(
        **{**plain(network.config), "condition_dim": 512}
    )
    same(network, found.network)
    assert found.null is None and not found.text


@pytest.mark.parametrize(
    "changes",
    [
        {"condition": "none", "mlp_type": "conv_mlp"},
        {"timestep_type": "adalayernorm_abs", "pos_emb_type": "parameter"},
        {"n_layer": 1, "mlp_hidden_times": 2, "block_activate": "GELU", "attn_dropout": 0.1},
    ],
    ids=str,
)
def test_sizes_come_from_shapes_and_hints(changes: dict) -> None:
    network = ours(**changes)
    hints = {"n_head": 2, "block_activate": network.config.block_activate,
             "attn_pdrop": network.config.attn_dropout}  # fmt: skip
    state = denoiser(network)
    state = {k: v for k, v in state.items() if k in network.state_dict() or ".attn." in k}
    model = convert(state, {**hints, "diffusion_step": 5}).model
    found = plain(build(ModelConfig, model))
    expected = plain(network.config)
    if network.config.condition == "none":
        found["condition_dim"] = expected["condition_dim"]
    assert found == expected
    # a training file says the number of steps by its schedule
    whole = {k: v for k, v in diffusion(network).items() if not k.endswith("mask")}
    assert convert(whole, hints).model["diffusion_steps"] == 5


HF = (
    (r"^content_emb\.", "latent_image_embedding."),
    (r"^blocks\.", "transformer_blocks."),
    (r"\.ln1\.", ".norm1."),
    (r"\.ln1_1\.", ".norm2."),
    (r"\.ln2\.", ".norm3."),
    (r"\.key\.", ".to_k."),
    (r"\.query\.", ".to_q."),
    (r"\.value\.", ".to_v."),
    (r"\.proj\.", ".to_out.0."),
    (r"\.mlp\.0\.", ".ff.net.0.proj."),
    (r"\.mlp\.2\.", ".ff.net.2."),
    (r"^to_logits\.0\.", "norm_out."),
    (r"^to_logits\.1\.", "out."),
)


def hugging_face(network: Denoiser) -> dict[str, Tensor]:
    state = {}
    for key, value in network.state_dict().items():
        for pattern, name in HF:
            key = re.sub(pattern, name, key)
        state[key] = value
    return state


@pytest.mark.parametrize("learnable", [True, False])
def test_a_hugging_face_folder(tmp_path: Path, learnable: bool) -> None:
    network = ours()
    (tmp_path / "transformer").mkdir()
    save_file(hugging_face(network), tmp_path / "transformer" / "model.safetensors")
    known = {"num_attention_heads": 2, "activation_fn": "geglu-approximate", "sample_size": 2}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(known))
    null = torch.randn(4, 16)
    if learnable:
        (tmp_path / HF_NULL).mkdir()
        save_file({"embeddings": null}, tmp_path / HF_NULL / "diffusion_pytorch_model.safetensors")
    found = convert(*load(tmp_path))
    assert build(ModelConfig, found.model) == network.config
    same(network, found.network)
    assert (found.null is not None) == learnable
    if found.null is not None:
        assert torch.equal(found.null, null)
    with pytest.raises(ValueError, match="activation_fn must be one of"):
        convert(hugging_face(network), {"activation_fn": "geglu"})


def test_every_left_over_missing_or_misshapen_key_is_named() -> None:
    state = training_file(ours(), ours())["model"]
    convert(state, {"n_head": 2})
    optional = re.compile(r".*(mask|log_.*|Lt_.*|content_codec.*)$")
    needed = [key for key in state if not optional.match(key)]
    assert len(needed) > 60
    for key in needed:
        with pytest.raises(ValueError):
            convert({k: v for k, v in state.items() if k != key}, {"n_head": 2})
    extra = ("odd", "transformer.odd", "transformer.transformer.odd", "transformer.log_odd",
             "transformer.transformer.blocks.0.attn2.odd", "transformer.condition_emb.odd",
             "transformer.condition_emb.transformer.resblocks.0.odd")  # fmt: skip
    for key in extra:
        with pytest.raises(ValueError, match=r"odd"):
            convert({**state, key: torch.zeros(1)}, {"n_head": 2})
    bent = {**state, "transformer.transformer.to_logits.1.bias": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"to_logits\.1\.bias"):
        convert(bent, {"n_head": 2})
    with pytest.raises(ValueError, match=r"no VQ-Diffusion checkpoint.*'unet'"):
        convert({"unet": torch.zeros(1)})

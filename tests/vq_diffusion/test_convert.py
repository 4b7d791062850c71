"""Official VQ-Diffusion files in every layout; the names here are the released ones."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from experiments import sample
from experiments.cli import command
from experiments.convert import run
from experiments.report.pictures import load_png
from lightning_modules.common.settings import build, plain
from lightning_modules.common.text import openai_clip_text
from lightning_modules.registry import load_generator
from lightning_modules.vq_diffusion.config import ModelConfig
from lightning_modules.vq_diffusion.convert import HF_NULL, convert, load, scheduled_rate
from lightning_modules.vq_diffusion.network import Denoiser
from lightning_modules.vqgan.module import VQGANModule

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


def main(words: list[str]) -> int:
    """Run the command; returns the exit code."""
    return command(run, words)


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


def clip(vocabulary: int = 9) -> dict[str, Tensor]:
    """A text transformer by OpenAI's names with the released precision."""
    layer = "transformer.resblocks.0"
    shapes = {
        "positional_embedding": (4, WIDTH),
        "token_embedding.weight": (vocabulary, WIDTH),
        "text_projection": (WIDTH, 5),
        f"{layer}.attn.in_proj_weight": (3 * WIDTH, WIDTH),
        f"{layer}.attn.in_proj_bias": (3 * WIDTH,),
        f"{layer}.attn.out_proj.weight": (WIDTH, WIDTH),
        f"{layer}.attn.out_proj.bias": (WIDTH,),
        f"{layer}.mlp.c_fc.weight": (4 * WIDTH, WIDTH),
        f"{layer}.mlp.c_fc.bias": (4 * WIDTH,),
        f"{layer}.mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
        f"{layer}.mlp.c_proj.bias": (WIDTH,),
        **{
            f"{n}.{k}": (WIDTH,)
            for n in (f"{layer}.ln_1", f"{layer}.ln_2", "ln_final")
            for k in ("weight", "bias")
        },
    }
    return {
        k: torch.randn(s).half() if "proj" in k or "c_fc" in k else torch.randn(s)
        for k, s in shapes.items()
    }


def training_file(
    network: Denoiser,
    average: Denoiser,
    null: bool = False,
    tokenizer: dict[str, Tensor] | None = None,
    vocabulary: int = 9,
) -> dict:
    """What the released solver writes."""
    text = {f"condition_emb.{k}": v for k, v in clip(vocabulary).items()}
    whole = {**diffusion(network, null), **(text if network.config.condition == "text" else {})}
    tokenizer = tokenizer or {"enc.encoder.conv_in.weight": torch.zeros(1)}
    return {
        "model": {
            **{f"content_codec.{k}": v for k, v in tokenizer.items()},
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
    network = ours(
        condition="class",
        class_number=classes,
        mlp_type="conv_mlp",
        mlp_hidden_times=3,
        class_type=class_type,
    )
    state = diffusion(network, null=classes == 6)
    for name in ("alpha", "1_min_alpha", "cumprod_alpha", "1_min_cumprod_alpha"):
        state[f"log_{name}"] = torch.zeros(5)
    found = convert(state, {"n_head": 2, "class_type": class_type})
    assert build(ModelConfig, found.model) == ModelConfig(
        **{**plain(network.config), "condition_dim": 512}
    )
    same(network, found.network)
    assert found.null is None and not found.text and found.learnable == (classes == 6)


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
    hints = {
        "n_head": 2,
        "block_activate": network.config.block_activate,
        "attn_pdrop": network.config.attn_dropout,
    }
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
    assert (found.null is not None) == learnable == found.learnable
    if found.null is not None:
        assert torch.equal(found.null, null)
    with pytest.raises(ValueError, match="activation_fn must be one of"):
        convert(hugging_face(network), {"activation_fn": "geglu"})


def test_an_empty_null_is_none() -> None:
    """What diffusers writes of LearnedClassifierFreeSamplingEmbeddings(learnable=False)."""
    found = convert(
        {**hugging_face(ours()), f"{HF_NULL}.embeddings": torch.empty(0)}, {"n_head": 2}
    )
    assert found.null is None and not found.learnable
    with pytest.raises(ValueError, match="must be 16 wide, got 3"):
        convert({**hugging_face(ours()), f"{HF_NULL}.embeddings": torch.ones(4, 3)}, {"n_head": 2})


HF_SCHEDULER = {
    "_class_name": "VQDiffusionScheduler",
    "num_vec_classes": 7,
    "num_train_timesteps": 5,
    "alpha_cum_start": 0.99999,
    "alpha_cum_end": 9e-06,
    "gamma_cum_start": 9e-06,
    "gamma_cum_end": 0.99999,
}


def test_the_schedule_of_a_hugging_face_folder() -> None:
    model = ours().config
    assert scheduled_rate(HF_SCHEDULER, model) == 0.99999
    assert scheduled_rate({}, model) == 0.99999  # diffusers' defaults are the released schedule
    assert scheduled_rate({**HF_SCHEDULER, "gamma_cum_end": 0.9}, model) == 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "DDPMScheduler"}, "must be a VQDiffusionScheduler"),
        ({"num_vec_classes": 9}, "num_vec_classes of the scheduler must be 7, got 9"),
        ({"num_train_timesteps": 50}, "num_train_timesteps of the scheduler must be 5"),
        ({"alpha_cum_end": 0.3, "gamma_cum_end": 0.5}, "no schedule.mask_rate expresses"),
        ({"gamma_cum_start": 0.000001}, "no schedule.mask_rate expresses"),
        ({"gamma_cum_end": "0.9"}, "must be probabilities"),
        ({"gamma_cum_end": 1.5}, "must be probabilities"),
    ],
)
def test_a_schedule_that_is_not_ours(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheduled_rate({**HF_SCHEDULER, **changes}, ours().config)


def test_every_left_over_missing_or_misshapen_key_is_named() -> None:
    state = training_file(ours(), ours())["model"]
    convert(state, {"n_head": 2})
    optional = re.compile(r".*(mask|log_.*|Lt_.*|content_codec.*)$")
    needed = [key for key in state if not optional.match(key)]
    assert len(needed) > 60
    for key in needed:
        with pytest.raises(ValueError):
            convert({k: v for k, v in state.items() if k != key}, {"n_head": 2})
    extra = (
        "odd",
        "transformer.odd",
        "transformer.transformer.odd",
        "transformer.log_odd",
        "transformer.transformer.blocks.0.attn2.odd",
        "transformer.condition_emb.odd",
        "transformer.condition_emb.transformer.resblocks.0.odd",
    )
    for key in extra:
        with pytest.raises(ValueError, match=r"odd"):
            convert({**state, key: torch.zeros(1)}, {"n_head": 2})
    bent = {**state, "transformer.transformer.to_logits.1.bias": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"to_logits\.1\.bias"):
        convert(bent, {"n_head": 2})
    with pytest.raises(ValueError, match=r"no VQ-Diffusion checkpoint.*'unet'"):
        convert({"unet": torch.zeros(1)})


FIRST_STAGE = {
    "ch": 8,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "z_channels": 4,
    "embed_dim": 4,
    "num_codes": 12,
    "norm_groups": 4,
    "quantizer": "gumbel",
}
IDS = torch.tensor([0, 1, 0, 0, 2, 3, 0, 0, 4, 0, 0, 5])


def tokenizer() -> tuple[VQGANModule, dict[str, Tensor]]:
    """A tokenizer of 12 codes, and its tensors as encoder and decoder of an official file."""
    torch.manual_seed(4)
    module = VQGANModule({"model": FIRST_STAGE, "objective": {"disc_weight": 0.0}})
    state, halves = module.export()[0], {}
    for key, value in state.items():
        if key.startswith(("encoder.", "quant_conv.", "quantize.")):
            halves[f"enc.{key}"] = value
        if key.startswith(("decoder.", "post_quant_conv.", "quantize.")):
            halves[f"dec.{key}"] = value
    return module.eval(), halves


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Denoiser]:
    """Write official.pth and the table of codes to the folder that the test runs in."""
    monkeypatch.chdir(tmp_path)

    def write(null: bool = False, **changes) -> Denoiser:
        changes = {"condition_dim": WIDTH, "spatial_size": [4, 4], **changes}
        network = ours(**changes)
        file = training_file(network, network, null, tokenizer()[1], vocabulary=49408)
        torch.save(file, "official.pth")
        torch.save(IDS, "taming_vqvae_6.pt")
        return network

    return write


def words(paper: str, *more: str) -> list[str]:
    return [
        "--paper",
        paper,
        "--from",
        "official.pth",
        "--codes",
        "taming_vqvae_6.pt",
        "--out",
        "x",
        "data.resolution=8",
        "tokenizer.model.norm_groups=4",
        "model.n_head=2",
        "sampling.steps=3",
        *more,
    ]


def pictures(*prompts: str, ckpt: str = "x.safetensors", **changes: str) -> list[Tensor]:
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    settings = [f"{k.replace('_', '.', 1)}={v}" for k, v in changes.items()]
    out = f"out{len(list(Path().iterdir()))}"
    assert (
        command(sample.run, ["--ckpt", ckpt, *asked, "--out", out, "--seed", "3", *settings]) == 0
    )
    return [load_png(f"{out}/{i:05d}.png")[0] for i in range(len(prompts))]


def check_guidance() -> None:
    """Guidance changes pictures."""
    prompts = ("a cat", "a dog", "a red house", "two small trees", "the sea")
    one, other = (pictures(*prompts, sampling_guidance=s) for s in ("1.0", "100.0"))
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_text_file_samples_with_what_came_with_it(
    official: Callable[..., Denoiser], tmp_path: Path
) -> None:
    network = official()
    assert main(words("vq_diffusion")) == 0
    names = {"x.safetensors", "x.tokenizer.safetensors", "x.text.safetensors"}
    assert {p.name for p in tmp_path.glob("x*")} == names
    module = load_generator("x.safetensors")
    same(network, module.network.state_dict())
    assert module.config.schedule.mask_rate == pytest.approx(0.9)
    assert module.first_stage.num_codes == 6 and module.grid == (4, 4)
    assert torch.equal(module.loss_count, torch.full((5,), 3.0))
    module.first_stage.autoencoder.quantize.config.sample_tokens = False
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(module.first_stage.encode(images), IDS[tokenizer()[0].encode(images)])
    cat, dog = pictures("a cat", "a dog")
    assert cat.shape == (3, 8, 8) and not torch.equal(cat, dog)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in names:
        (tmp_path / name).rename(moved / name)
    assert torch.equal(pictures("a cat", ckpt=f"{moved}/x.safetensors")[0], cat)


def test_the_learnable_null_needs_its_paper(
    official: Callable[..., Denoiser], capsys: pytest.CaptureFixture[str]
) -> None:
    official(null=True)
    assert main(words("vq_diffusion")) == 2
    assert "learnable null: take --paper improved_vqd" in capsys.readouterr().err
    assert main(words("improved_vqd", "sampling.reveal=schedule")) == 0
    module = load_generator("x.safetensors")
    null = load("official.pth")[0]["transformer.empty_text_embed"].float()
    assert torch.equal(module.null, null) and module.config.null_condition.name == "learned"
    check_guidance()


def test_a_plain_file_is_guided_without_training(official: Callable[..., Denoiser]) -> None:
    official()
    assert main(words("improved_vqd", "sampling.reveal=schedule")) == 0
    module = load_generator("x.safetensors")
    assert module.null is None and module.config.null_condition.name == "empty"
    check_guidance()


@pytest.mark.parametrize("learnable", [False, True])
def test_a_class_file_samples(official: Callable[..., Denoiser], learnable: bool) -> None:
    official(null=learnable, condition="class", class_number=5, mlp_type="conv_mlp")
    assert main(words("improved_vqd")) == 0
    module = load_generator("x.safetensors")
    assert module.config.num_classes == 5 - learnable
    sampling = module.config.sampling
    assert (sampling.guidance, sampling.truncation, sampling.order) == (1.5, 0.94, "diffusion")
    one, other = pictures("1", "3")
    assert not torch.equal(one, other)
    assert not list(Path().glob("x.text*"))


def test_codes_that_do_not_fit_are_refused(
    official: Callable[..., Denoiser], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    official()
    lacking = [w for w in words("vq_diffusion") if w not in ("--codes", "taming_vqvae_6.pt")]
    assert main(lacking) == 2
    said = capsys.readouterr().err
    assert "trained on 6 codes and the tokenizer has 12" in said and "--codes" in said
    assert not list(tmp_path.glob("x*"))


def test_more_tokens_than_positions_are_refused(
    official: Callable[..., Denoiser], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    official()
    assert (
        main([w.replace("data.resolution=8", "data.resolution=16") for w in words("vq_diffusion")])
        == 2
    )
    said = capsys.readouterr().err
    assert "8x8 tokens, and VQ-Diffusion has positions for 16; set data.resolution" in said
    assert not list(tmp_path.glob("x*"))
    assert (
        main([w for w in words("vq_diffusion") if "resolution" not in w]) == 2
    )  # 256 of the scale
    assert "data.resolution=256 gives 128x128 tokens" in capsys.readouterr().err


def test_sampling_that_the_grid_does_not_allow_is_refused(
    official: Callable[..., Denoiser], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    official()
    assert main(words("improved_vqd", "sampling.reveal=released")) == 2
    assert "reveal=released knows 1024 tokens" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))


def test_a_whole_hugging_face_folder_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    monkeypatch.chdir(tmp_path)
    network = ours(num_codes=12, spatial_size=[4, 4])
    folder = Path("vq-diffusion-ithq")
    for name in ("transformer", "vqvae", HF_NULL):
        (folder / name).mkdir(parents=True)
    save_file(hugging_face(network), folder / "transformer" / "model.safetensors")
    known = {"num_attention_heads": 2, "activation_fn": "geglu-approximate", "sample_size": 4}
    settings = {
        "transformer/config.json": known,
        "scheduler/scheduler_config.json": {
            **HF_SCHEDULER,
            "num_vec_classes": 13,
            "gamma_cum_end": 0.9,
        },
        "tokenizer/tokenizer_config.json": {"pad_token": "<|endoftext|>"},
    }
    for name, content in settings.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    save_file({"embeddings": torch.randn(4, 16)}, folder / HF_NULL / "model.safetensors")
    taming = VQGANModule(
        {"model": {**FIRST_STAGE, "quantizer": "nearest"}, "objective": {"disc_weight": 0.0}}
    )
    save_file(taming.export()[0], folder / "vqvae" / "model.safetensors")
    (folder / "vqvae" / "config.json").write_text(json.dumps({"norm_num_groups": 4}))
    text = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4,
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")

    command = ["--paper", "improved_vqd", "--from", str(folder), "--out", "x"]
    assert main([*command, "sampling.steps=3", "sampling.reveal=schedule"]) == 0
    module = load_generator("x.safetensors")
    same(network, module.network.state_dict())
    assert module.config.text.path == f"{folder}/text_encoder" and module.grid == (4, 4)
    assert module.config.schedule.mask_rate == 0.9 and module.config.text.pad_id == 49407
    assert module.config.sampling.guidance == 5.0 and not list(Path().glob("x.text*"))
    one, other = pictures("a cat", "a dog")
    assert not torch.equal(one, other)

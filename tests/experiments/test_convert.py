"""Official checkpoints in, files that experiments.sample takes out."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.files import file_hash, write_json
from experiments import sample
from experiments.cli import command
from experiments.convert import run
from experiments.report.pictures import load_png
from lightning_modules.common.checkpoint import load_weights
from lightning_modules.common.request import Request
from lightning_modules.muse import convert as muse
from lightning_modules.muse.config import UViTConfig
from lightning_modules.muse.uvit import UViT
from lightning_modules.paella import convert as paella
from lightning_modules.paella.config import ModelConfig, PriorConfig, V1Config
from lightning_modules.paella.network import Paella
from lightning_modules.paella.network_v1 import DenoiseUNet
from lightning_modules.paella.prior import Prior
from lightning_modules.registry import load_first_stage, load_generator
from lightning_modules.vqgan.module import VQGANModule

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
MODEL = ModelConfig(
    c_in=8,
    c_out=8,
    num_labels=24,
    c_r=8,
    patch_size=2,
    c_cond=12,
    c_hidden=[12, 16],
    nhead=[-1, 2],
    blocks=[1, 1],
    level_config=["CT", "CTA"],
    clip_embd=16,
    byt5_embd=16,
    clip_seq_len=2,
)


def main(words: list[str]) -> int:
    """Run the command; returns the exit code."""
    return command(run, words)


def official_tokenizer(codes: int = 24) -> dict[str, Tensor]:
    """A tiny vqgan_f4.pt: the released names, random weights."""
    torch.manual_seed(1)
    model = {
        "network": "paella",
        "num_codes": codes,
        "levels": 2,
        "bottleneck_blocks": 1,
        "c_hidden": 8,
        "c_latent": 4,
    }
    module = VQGANModule({"model": model, "objective": {"disc_weight": 0.0}})
    state, _ = module.export()
    return {k.replace("quantize.embedding", "vquantizer.codebook"): v for k, v in state.items()}


def official_paella() -> dict[str, Tensor]:
    """A tiny paella_v3.pt: its names are ours."""
    torch.manual_seed(2)
    network = Paella(MODEL)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.state_dict()


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of official files and of the text encoders that they need."""
    import open_clip
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("official")
    torch.save({"state_dict": official_paella()}, folder / "paella_v3.pt")
    torch.save(official_tokenizer(), folder / "vqgan_f4.pt")
    torch.save(official_tokenizer(10), folder / "other_f4.pt")
    torch.save(Prior(PriorConfig(16, 8, 4, 1)).state_dict(), folder / "prior_v1.pt")
    (folder / "text.pt").write_text("no checkpoint")
    save_file({"a": torch.zeros(1)}, folder / "strange.safetensors")
    lacking = dict(list(official_paella().items())[:-1])
    torch.save(lacking, folder / "lacking.pt")
    torch.manual_seed(3)
    t5 = T5Config(
        vocab_size=384,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    T5EncoderModel(t5).save_pretrained(folder / "byt5")
    (folder / "official-micro.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(folder / "official-micro.json")
    clip = open_clip.create_model("official-micro")
    torch.save(clip.state_dict(), folder / "clip.pt")
    return folder


@pytest.fixture
def convert(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> int:
        return main([w.replace("@", f"{official}/") for w in words])

    return run


PAELLA = ("--paper", "paella", "--from", "@paella_v3.pt", "--tokenizer", "@vqgan_f4.pt")
WORDS = (
    "model.nhead=[-1,2]",
    "data.resolution=32",
    "text.path=@byt5",
    "text.clip=official-micro",
    "text.clip_pretrained=@clip.pt",
)


def test_paella_converts_and_samples(
    official: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(*PAELLA, "--out", "x", *WORDS, "sampling.steps=2") == 0
    said = capsys.readouterr().out
    count = sum(p.numel() for p in Paella(MODEL).parameters())
    assert f"{count:,} parameters, 8x8 tokens -> x.safetensors" in said
    assert "24 codes, f4 -> x.tokenizer.safetensors" in said
    _, config = load_weights("x.safetensors")
    assert config["model"] == dataclasses.asdict(MODEL)
    assert config["text"]["mask_padding"] is False  # as the released code attends
    module = load_generator("x.safetensors")
    for name, value in official_paella().items():
        assert torch.equal(module.state_dict()[f"network.{name}"], value), name
    assert module.first_stage.num_codes == 24 and module.grid == (8, 8)

    words = ["--ckpt", "x.safetensors", "--prompt", "a bowl", "--seed", "3"]
    assert command(sample.run, [*words, "--out", "a"]) == 0
    picture, text = load_png("a/00000.png")
    assert picture.shape == (3, 32, 32) and text["prompt"] == "a bowl"
    assert command(sample.run, [*words, "--out", "b", "--negative", "dull"]) == 0
    assert not torch.equal(load_png("b/00000.png")[0], picture)
    # a variation sees the picture's CLIP vector too
    assert command(sample.run, [*words[:2], "--image", "a/00000.png", "--out", "c"]) == 0
    assert load_png("c/00000.png")[0].shape == (3, 32, 32)


def test_text_encoders_may_move(
    official: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(*PAELLA, "--out", "x", *WORDS[:2], WORDS[3], WORDS[4]) == 0
    words = ["--ckpt", "x.safetensors", "--prompt", "a", "sampling.steps=2"]
    assert command(sample.run, [*words, "text.path=nowhere/byt5"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "text.path=nowhere/byt5" in error
    assert command(sample.run, [*words, f"text.path={official}/byt5"]) == 0


def test_suite_tokenizers_are_taken_as_they_are(convert: Callable[..., int]) -> None:
    assert convert("--paper", "vqgan", "--from", "@vqgan_f4.pt", "--out", "t.safetensors") == 0
    ours = load_first_stage("t.safetensors")
    state = official_tokenizer()
    assert torch.equal(ours.codebook(), state["vquantizer.codebook.weight"])
    assert convert(*PAELLA[:4], "--tokenizer", "t.safetensors", "--out", "x", *WORDS) == 0
    assert torch.equal(load_first_stage("x.tokenizer.safetensors").codebook(), ours.codebook())


def test_taming_files_with_hints(convert: Callable[..., int], tmp_path: Path) -> None:
    model: dict[str, Any] = {
        "ch": 8,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "z_channels": 4,
        "embed_dim": 4,
        "num_codes": 12,
        "norm_groups": 4,
    }
    state, _ = VQGANModule({"model": model, "objective": {"disc_weight": 0.0}}).export()
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    words = ("--paper", "vqgan", "--from", "last.ckpt", "--out", "t")
    assert convert(*words, "model.norm_groups=4") == 0
    assert load_first_stage("t.safetensors").config.model.norm_groups == 4


GUMBEL: dict[str, Any] = {
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
IDS = [0, 1, 0, 0, 2, 3, 0, 0, 0, 0, 0, 4]


@pytest.fixture
def gumbel(tmp_path: Path) -> VQGANModule:
    torch.manual_seed(5)
    module = VQGANModule({"model": GUMBEL, "objective": {"disc_weight": 0.0}})
    module.autoencoder.quantize.proj.weight.data.normal_(std=9)
    torch.save({"state_dict": module.export()[0]}, tmp_path / "last.ckpt")
    return module.eval()


CODES = ("--paper", "vqgan", "--from", "last.ckpt", "--out", "t")
HINTS = ("model.norm_groups=4", "model.sample_tokens=false")


def test_codes_get_the_ids_of_a_table(convert: Callable[..., int], gumbel: VQGANModule) -> None:
    torch.save(torch.tensor(IDS), "taming_vqvae_12.pt")
    assert convert(*CODES, "--codes", "taming_vqvae_12.pt", *HINTS) == 0
    ours = load_first_stage("t.safetensors")
    assert ours.num_codes == 5
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    tokens = gumbel.encode(images)
    assert len({IDS[i] for i in tokens.unique()}) > 1
    assert torch.equal(ours.encode(images), torch.tensor(IDS)[tokens])
    first = torch.tensor([0, 1, 4, 5, 11])
    ids = torch.arange(4).view(1, 2, 2) + 1
    torch.testing.assert_close(ours.decode(ids), gumbel.decode(first[ids]))


def test_codes_that_occur_in_a_cache_are_kept(
    convert: Callable[..., int], gumbel: VQGANModule, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(*CODES, *HINTS) == 0
    cache = Path("cache")
    cache.mkdir()
    tokens = torch.tensor([[[1, 4], [5, 11]], [[1, 1], [4, 4]]], dtype=torch.int32)
    save_file({"tokens": tokens[:1]}, cache / "00000.safetensors")
    save_file({"tokens": tokens[1:]}, cache / "00001.safetensors")
    made = {"num_codes": 12, "tokenizer": file_hash("t.safetensors")}
    parts = [{"name": f"{i:05d}"} for i in range(2)]
    write_json(cache / "cache.json", {"made": made, "parts": parts, "count": 2, "about": {}})
    words = ("--paper", "vqgan", "--from", "t.safetensors", "--codes", "cache", "--out")
    assert convert(*words, "kept") == 0
    ours = load_first_stage("kept.safetensors")
    assert ours.num_codes == 5
    assert ours.autoencoder.quantize.used.tolist() == [0, 1, 4, 5, 11]
    capsys.readouterr()

    torch.save(torch.zeros(11, dtype=torch.int64), "short.pt")
    torch.save({"a": torch.zeros(1), "b": torch.zeros(1)}, "two.pt")
    other = {"made": {**made, "tokenizer": "other"}, "parts": parts, "count": 2, "about": {}}
    write_json(cache / "cache.json", other)
    for source, codes, message in (
        ("t.safetensors", "cache", "cache was made with another tokenizer"),
        ("t.safetensors", "short.pt", "12 whole numbers"),
        ("t.safetensors", "two.pt", "one tensor"),
        ("t.safetensors", "none.pt", "there is no file none.pt"),
        ("kept.safetensors", "short.pt", "keeps 5 of its codes already"),
    ):
        wrong = ("--paper", "vqgan", "--from", source, "--codes", codes, "--out", "z")
        assert convert(*wrong) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not Path("z.safetensors").exists()


def test_nothing_is_overwritten(
    convert: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for taken in ("x.safetensors", "x.tokenizer.safetensors"):
        (tmp_path / taken).write_text("mine")
        assert convert(*PAELLA, "--out", "x", *WORDS) == 2
        assert f"{taken} exists" in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == [taken]
        (tmp_path / taken).unlink()


def test_settings_of_the_network_of_2022(tmp_path: Path) -> None:
    state = DenoiseUNet(V1Config(24, 8, 16, 4, [1, 1], [1, 1])).state_dict()
    torch.save(state, tmp_path / "model_600000.pt")
    found = paella.read(tmp_path / "model_600000.pt", {"v1.c_r": 4})
    assert found.num_codes == 24
    pairs = dict(found.settings)
    assert pairs["network"] == "v1" and pairs["text.name"] == "open_clip"
    assert (pairs["v1.num_labels"], pairs["v1.c_hidden"], pairs["v1.c_r"]) == (24, 8, 4)
    assert dict(found.defaults)["sampling.schedule"] == "cosine"
    assert set(found.state) == {f"network.{name}" for name in state}


UVIT = UViTConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    in_channels=8,
    block_out_channels=8,
    block_num_heads=2,
    num_res_blocks=1,
    vocab_size=24,
    codebook_size=20,
    encoder_hidden_size=16,
    cond_embed_dim=12,
    micro_cond_encode_dim=4,
    micro_cond_embed_dim=20,
)


@pytest.fixture(scope="module")
def amused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny folder of aMUSEd's pipeline, with an f2 tokenizer by taming's names."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    folder = tmp_path_factory.mktemp("amused")
    torch.manual_seed(4)
    network = UViT(UVIT)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    codec = {
        "num_codes": 20,
        "ch": 4,
        "ch_mult": [1, 1],
        "num_res_blocks": 1,
        "norm_groups": 4,
        "attn_resolutions": [],
        "attn_type": "none",
        "z_channels": 4,
        "embed_dim": 4,
    }
    tokenizer = VQGANModule({"model": codec, "objective": {"disc_weight": 0.0}})
    torch.nn.init.normal_(tokenizer.autoencoder.quantize.embedding.weight)
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=16,
            intermediate_size=16,
            projection_dim=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    )
    text.save_pretrained(folder / "text_encoder")
    sizes = {k: v for k, v in dataclasses.asdict(UVIT).items() if "heads" in k or "micro" in k}
    settings = {
        "transformer/config.json": {**sizes, "sample_size": 4, "use_bias": False},
        "vqvae/config.json": {
            "norm_num_groups": 4,
            "lookup_from_codebook": True,
            "block_out_channels": [4, 4],
        },
        "tokenizer/tokenizer_config.json": {"pad_token": "<|endoftext|>"},
    }
    for name, content in settings.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(json.dumps(content))
    weights = "diffusion_pytorch_model.safetensors"
    save_file(network.state_dict(), folder / "transformer" / weights)
    save_file(tokenizer.export()[0], folder / "vqvae" / weights)
    return folder


def test_settings_of_amused(amused: Path) -> None:
    found = muse.read(amused, {})
    pairs = dict([*found.settings, *found.defaults])
    state = load_file(next((amused / "transformer").glob("*.s*")))
    assert found.num_codes == 20
    assert {k: v for k, v in pairs.items() if k.startswith("uvit.")} == {
        f"uvit.{k}": v for k, v in dataclasses.asdict(UVIT).items() if f"uvit.{k}" in pairs
    }
    assert pairs["uvit.num_attention_heads"] == 2 and pairs["network"] == "uvit"
    assert (pairs["sampling.guidance_end"], pairs["sampling.steps"]) == (10.0, 12)
    assert (pairs["text.name"], pairs["text.hidden_state"], pairs["text.pad_id"]) == (
        "clip",
        -2,
        49407,
    )
    assert pairs["text.path"] == str(amused / "text_encoder")
    assert (found.side, found.tokenizer) == (4, amused / "vqvae")
    assert set(found.state) == {f"network.{name}" for name in state}
    # what a user may say otherwise
    assert {"sampling.steps", "text.pad_id", "text.path"} <= dict(found.defaults).keys()
    alone = muse.read(amused / "transformer", {})  # the network without the rest
    assert "text.path" not in dict(alone.defaults) and alone.tokenizer is None
    assert dict(alone.settings)["uvit.hidden_size"] == 16


@pytest.mark.bits
def test_amused_converts_and_samples(
    amused: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert("--paper", "muse", "--from", str(amused), "--out", "x", "sampling.steps=3") == 0
    said = capsys.readouterr().out
    count = sum(p.numel() for p in UViT(UVIT).parameters())
    assert f"{count:,} parameters, 4x4 tokens -> x.safetensors" in said
    module = load_generator("x.safetensors")
    assert module.first_stage.config.model.unit_range and module.grid == (4, 4)
    assert module.config.uvit == UVIT and module.config.sampling.steps == 3
    for name, value in load_file(next((amused / "transformer").glob("*.s*"))).items():
        assert torch.equal(module.state_dict()[f"network.{name}"], value), name
    words = ["--ckpt", "x.safetensors", "--prompt", "a bowl", "--seed", "3"]
    assert command(sample.run, [*words, "--out", "a"]) == 0
    assert load_png("a/00000.png")[0].shape == (3, 8, 8)
    # pictures of prompts do not hang on each other; bits do on the size of a batch
    one, other = (
        module.sample(Request([text, "a bowl"], seeds=[i, 3])) for i, text in enumerate("ab")
    )
    assert torch.equal(one[1], other[1]) and not torch.equal(one[0], other[0])


def with_(*changes: str) -> list[str]:
    """The good command with options replaced: with_("--from", "x") or further words."""
    words = [*PAELLA, "--out", "x", *WORDS]
    for name, value in zip(changes[::2], changes[1::2], strict=False):
        words[words.index(name) + 1] = value
    return words


WRONG: list[tuple[list[str], str]] = [
    ([], "--paper is missing"),
    (["--paper", "paella"], "--from is missing"),
    ([*PAELLA], "--out is missing"),
    ([*PAELLA[:4], "--out", "x"], "--tokenizer is missing"),
    (with_("--paper", "paela"), "did you mean paella?"),
    ([*with_(), "--fro", "x"], "did you mean --from?"),
    ([*with_(), "model.nheads=[1]"], "did you mean model.nhead?"),
    ([*with_(), "model.blocks=[2,1]"], "model.blocks is [1, 1]"),
    ([*with_(), "model.nhead=[-1,3]"], "nhead must divide"),
    ([*with_(), "data.resolution=30"], "data.resolution must be a multiple of 4, got 30"),
    ([*with_(), "data.resolution=20"], "data.resolution must be a multiple of 16, got 20"),
    ([*with_(), "tokenizer.model.num_codes=5"], "model.num_codes is 24 in the file, not 5"),
    (with_("--from", "none.pt"), "there is no file none.pt"),
    (with_("--from", "@text.pt"), "text.pt is no checkpoint that can be read safely"),
    (with_("--from", "@strange.safetensors"), "is no Paella checkpoint"),
    (with_("--from", "@vqgan_f4.pt"), "is no Paella checkpoint"),
    (with_("--from", "@prior_v1.pt"), "prior"),
    (with_("--from", "@lacking.pt"), "the checkpoint lacks out_mapper.1.weight"),
    (with_("--tokenizer", "none.pt"), "there is no file none.pt"),
    (with_("--tokenizer", "@paella_v3.pt"), "no known tokenizer layout"),
    (with_("--tokenizer", "@other_f4.pt"), "trained on 24 codes and the tokenizer has 10"),
    (["--paper", "vqgan", "--from", "@strange.safetensors", "--out", "x"], "no known tokenizer"),
    ([*with_("--paper", "vqgan")[:8]], "--tokenizer goes with generators"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda v: str(v)[-50:])
def test_wrong_words_are_one_line_and_leave_nothing(
    convert: Callable[..., int],
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert convert(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


def refused(convert: Callable[..., int], capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which a command is refused that leaves no file."""
    assert convert(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not list(Path().glob("x*"))
    return error


BENT: dict[str, Callable[[Tensor], Tensor]] = {
    "must have 4 dimensions": lambda v: v.flatten(),
    "of 0, got [0]": lambda v: v.new_empty(0),
    "holds numbers that are not finite": lambda v: v / 0,
    "must hold real numbers, got torch.int64": lambda v: v.long(),
    "must hold real numbers, got torch.complex64": lambda v: v.to(torch.complex64),
    "is a tensor of kind torch.sparse_coo": lambda v: v.to_sparse(),
}


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("message", BENT)
def test_weights_that_are_none_are_refused_by_name(
    official: Path, convert: Callable[..., int], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for state, key, words in (
        (official_paella(), "embedding.1.weight", with_("--from", "bent.pt")),
        (official_tokenizer(), "in_block.1.weight", with_("--tokenizer", "bent.pt")),
    ):
        torch.save({**state, key: BENT[message](state[key])}, "bent.pt")
        said = refused(convert, capsys, *words)
        assert message in said and key in said


def test_hints_of_a_wrong_type_are_refused(
    convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for word in ("model.nhead=2", "model.nhead=[a]", "model.dropout=[1]", "model.self_attn=3"):
        name = word.partition("=")[0].rpartition(".")[2]
        assert name in refused(convert, capsys, *with_(), word)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("transformer/config.json", [], "must hold a mapping"),
        ("transformer/config.json", {"num_attention_heads": "2"}, "num_attention_heads must be"),
        ("transformer/config.json", {"micro_cond_embed_dim": None}, "micro_cond_embed_dim must be"),
        ("transformer/config.json", {"sample_size": "4"}, "sample_size must be"),
        ("vqvae/config.json", 3, "must hold a mapping"),
        ("vqvae/config.json", {"norm_num_groups": [4]}, "norm_groups must be int"),
        ("vqvae/config.json", {"norm_num_groups": 4, "ddconfig": [1]}, "ddconfig must be"),
        ("tokenizer/tokenizer_config.json", {"pad_token": "[PAD]"}, "give text.pad_id"),
    ],
)
def test_settings_of_a_folder_that_are_none(
    amused: Path,
    convert: Callable[..., int],
    file: str,
    content: Any,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(amused, tmp_path / "bent")
    known = json.loads((folder / file).read_text())
    bent = {**known, **content} if isinstance(content, dict) else content
    (folder / file).write_text(json.dumps(bent))
    words = ("--paper", "muse", "--from", "bent", "--out", "x", "sampling.steps=3")
    assert message in refused(convert, capsys, *words)


def test_the_grid_comes_with_the_file(amused: Path, convert: Callable[..., int]) -> None:
    """aMUSEd's sample_size counts tokens, whatever the tokenizer makes of a token."""
    words = ("--paper", "muse", "--from", str(amused))
    assert (
        convert(*words, "--out", "x") == 0
        and convert(*words, "--out", "y", "data.resolution=16") == 0
    )
    assert load_weights("x.safetensors")[1]["grid"] == [4, 4]
    assert load_weights("y.safetensors")[1]["grid"] == [8, 8]


def test_a_folder_that_takes_no_files(
    official: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("no folder")
    assert "cannot be written" in refused(convert, capsys, *with_("--out", "file/x"))


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "vqgan_f4.pt" in capsys.readouterr().out


# Paella's prior, and what else a picture can be conditioned on ----


def draw(argv: list[str]) -> int:
    return command(sample.run, argv)


def official_paella_seeing(see: bool = True) -> dict[str, Tensor]:
    """A tiny paella_v3.pt whose network sees image vectors, or not."""
    torch.manual_seed(2)
    network = Paella(dataclasses.replace(MODEL, clip_image=see))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.state_dict()


def test_paellas_prior_converts_and_draws_the_image_vector(
    convert: Callable[..., int], official: Path, tmp_path: Path, capsys
) -> None:
    torch.save({"state_dict": official_paella_seeing()}, tmp_path / "seeing.pt")
    prior = Prior(PriorConfig(16, 8, 4, 1))
    torch.save(prior.state_dict(), tmp_path / "prior.pt")
    paella = ("--paper", "paella", "--from", str(tmp_path / "seeing.pt"), *PAELLA[4:])
    assert convert(*paella, "--prior", str(tmp_path / "prior.pt"), *WORDS, "--out", "p") == 0
    assert "prior" in capsys.readouterr().out and Path("p.prior.safetensors").is_file()
    words = ["--ckpt", "p.safetensors", "--prompt", "a cat", "sampling.steps=2"]
    Image.new("RGB", (32, 32), "red").save(tmp_path / "s.png")
    drawn = {}
    for name, more in {
        "plain": [],
        "prior": ["--prior", "sampling.prior.steps=3"],
        "other": ["--prior", "sampling.prior.steps=3", "sampling.prior.guidance=1"],
        "style": ["--style", str(tmp_path / "s.png")],
        "attention": ["--attention", "0,0"],
    }.items():
        assert draw([*words, *more, "--out", name]) == 0, name
        drawn[name] = Path(name, "00000.png").read_bytes()
        assert draw([*words, *more, "--out", f"{name}2"]) == 0
        with Image.open(f"{name}/00000.png") as one, Image.open(f"{name}2/00000.png") as two:
            assert one.tobytes() == two.tobytes()
    assert len(set(drawn.values())) == len(drawn)


def test_a_prior_that_does_not_fit_is_refused(
    convert: Callable[..., int], tmp_path: Path, capsys
) -> None:
    torch.save({"state_dict": official_paella_seeing(False)}, tmp_path / "blind.pt")
    blind = ("--paper", "paella", "--from", str(tmp_path / "blind.pt"), *PAELLA[4:])
    assert convert(*blind, "--prior", "@prior_v1.pt", *WORDS, "--out", "p") == 2
    assert "the prior draws image vectors of length 16" in capsys.readouterr().err
    assert convert(*PAELLA, "--prior", "@paella_v3.pt", *WORDS, "--out", "p") == 2
    assert "this is a token predictor (v3), not the diffusion prior" in capsys.readouterr().err
    assert not list(tmp_path.glob("p*"))
    assert convert(*PAELLA, *WORDS, "--out", "p") == 0
    for words, says in [
        (["--prior"], "this checkpoint has no prior: convert it again with --prior FILE"),
        (["--attention", "1,x"], "--attention takes numbers from 0 up"),
        (["--prior", "--style", "x.png"], "take one"),
    ]:
        capsys.readouterr()
        argv = ["--ckpt", "p.safetensors", "--prompt", "a", "sampling.steps=1", *words]
        assert draw(argv) == 2
        assert says in capsys.readouterr().err

"""Pictures from a micro checkpoint: text, edits, files, and every wrong word."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data.files import file_hash, write_json
from experiments.cli import command
from experiments.papers.registry import load
from experiments.pipeline.publish import Titles
from experiments.pipeline.runner import execute
from experiments.report.pictures import load_png
from experiments.sample import run
from lightning_modules.common.checkpoint import load_weights, save_weights
from lightning_modules.common.request import Request
from lightning_modules.registry import GENERATORS, load_generator
from lightning_modules.vqgan.module import VQGANModule
from tests.micro_checkpoint import SAMPLING, TOKENIZER, write
from tests.tiny_generators import MUSE, tiny

# two pixels per token, grids in multiples of two: sides are multiples of 4; trained on 16x16
SIDE = 16


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of random weights and its tokenizer."""
    return write(tmp_path_factory.mktemp("runs") / "micro", side=SIDE // 2)


def named(file: Path) -> dict[str, str]:
    return {"file": file.name, "sha256": file_hash(file)}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def main(argv: list[str]) -> int:
    return command(run, argv)


def sample(run_folder: Path, *words: str) -> int:
    return main(["--ckpt", str(run_folder), "--device", "cpu", *words])


def picture(path: str, width: int, height: int, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def pixels(path: str) -> np.ndarray:
    return load_png(path)[0].permute(1, 2, 0).numpy()


def test_pictures_carry_what_made_them(run_folder: Path) -> None:
    words = ["--prompt", "a red circle", "--prompt", "größer", "--count", "2", "--seed", "7"]
    assert sample(run_folder, *words, "sampling.steps=2", "--negative", "blur", "--out", "a") == 0
    names = sorted(path.name for path in Path("a").iterdir())
    assert names == ["00000.png", "00001.png", "00002.png", "00003.png", "grid.png"]
    texts = [load_png(f"a/{name}")[1] for name in names[:4]]
    assert [t["prompt"] for t in texts] == ["a red circle", "a red circle", "größer", "größer"]
    assert [t["seed"] for t in texts] == ["7", "8", "9", "10"]
    assert texts[0]["checkpoint"] == str(run_folder)
    assert texts[0]["checkpoint_sha256"] == file_hash(run_folder / "checkpoint.safetensors")
    settings = json.loads(texts[0]["settings"])
    assert settings["sampling"]["steps"] == 2 and settings["sampling"]["guidance_start"] == 3.0
    assert settings["negative"] == "blur" and "keep_known" not in settings
    assert pixels("a/00000.png").shape == (SIDE, SIDE, 3)


def test_pictures_are_the_modules_own(run_folder: Path) -> None:
    assert sample(run_folder, "--prompt", "a b", "--seed", "3", "--out", "a") == 0
    module = load_generator(run_folder / "checkpoint.safetensors")
    image = module.sample(Request(["a b"], [3]))[0]
    expected = (image * 127.5 + 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy()
    assert np.array_equal(pixels("a/00000.png"), expected.astype(np.uint8))


def test_a_picture_depends_on_its_prompt_and_seed_alone(run_folder: Path) -> None:
    """In batches of one shape, the last one filled up, to the byte; of any shape up to ties."""
    Path("p.txt").write_text("one thing\n\n  a longer prompt of words \nthree\n", encoding="utf-8")
    words = ["--prompts", "p.txt", "--batch-size"]
    assert sample(run_folder, *words, "2", "--out", "a") == 0
    assert sample(run_folder, *words, "2", "--seed", "9", "--out", "other") == 0
    assert sample(run_folder, *words, "2", "--out", "again") == 0
    assert sample(run_folder, *words, "1", "--out", "single") == 0
    names = [f"0000{i}.png" for i in range(3)]
    for name in names:
        assert np.array_equal(pixels(f"a/{name}"), pixels(f"again/{name}"))
        assert not np.array_equal(pixels(f"a/{name}"), pixels(f"other/{name}"))
    gaps = [abs(pixels(f"a/{n}").astype(int) - pixels(f"single/{n}")).max() for n in names]
    assert sum(gap <= 1 for gap in gaps) >= 2  # a token that flips changes one picture, rarely
    assert load_png("a/00001.png")[1]["prompt"] == "a longer prompt of words"
    assert (
        sample(
            run_folder,
            "--prompt",
            "three",
            "--seed",
            "2",
            "--prompt",
            "x",
            "--batch-size",
            "2",
            "--out",
            "last",
        )
        == 0
    )
    # the last batch of three is "three" twice: what fills it up changes nothing
    assert np.array_equal(pixels("last/00000.png"), pixels("a/00002.png"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_a_prompt(run_folder: Path, encoding: str) -> None:
    Path("p.txt").write_text("größer\n\ufeffb\r\n", encoding=encoding)
    assert sample(run_folder, "--prompts", "p.txt", "--out", "a") == 0
    assert [load_png(f"a/0000{i}.png")[1]["prompt"] for i in range(2)] == ["größer", "b"]
    assert sample(run_folder, "--prompt", "größer", "--prompt", "b", "--out", "b") == 0
    assert np.array_equal(pixels("a/00000.png"), pixels("b/00000.png"))


def test_a_line_says_what_is_drawn(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(run_folder, "--prompt", "a", "--size", "24x8", "--out", "a") == 0
    assert capsys.readouterr().out.splitlines() == [
        "drawing 1 picture of 24x8 pixels on cpu",
        "1 picture in a, all together in a/grid.png",
    ]


def test_words_that_training_never_saw(
    run_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of a run on embedded data they are named in one line; its own captions pass."""
    for file in run_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    beside = json.loads((tmp_path / "checkpoint.json").read_text())
    strange = ["--prompt", "A large red Dog, left of a cat", "--prompt", "a cat"]
    for data, prompts, named in (
        ("scenes", strange, "captions of scenes, which never say: dog, cat"),
        ("digits", strange[2:], "captions of digits, which never say: cat"),
        ("shards", strange, ""),
        (
            "scenes",
            [
                "--prompt",
                "on a grey background, a small cyan circle over a large red square",
                "--prompt",
                "a Blue triangle",
            ],
            "",
        ),
        ("digits", ["--prompt", "the digit seven, handwritten"], ""),
    ):
        write_json(tmp_path / "checkpoint.json", {**beside, "data": data})
        assert sample(tmp_path, *prompts) == 0
        notes = [line for line in capsys.readouterr().out.splitlines() if "note" in line]
        assert len(notes) == bool(named) and named in "".join(notes)


def test_help_names_the_papers_of_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for option, ability in (
        ("edit", "rewrite"),
        ("interpolate", "blend_with"),
        ("negative", "negative"),
        ("size", "grid"),
    ):
        (line,) = re.findall(rf"^  --{option} +([a-z_, ]+)(?:;.*)?$", said, re.MULTILINE)
        assert line.split(", ") == [n for n, cls in GENERATORS.items() if ability in cls.ABILITIES]


@pytest.mark.parametrize("section", ["tokenizer", "autoencoder"])
def test_the_run_of_a_first_stage_draws_nothing(
    run_folder: Path, section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("alone").mkdir()
    content = (run_folder / "tokenizer.safetensors").read_bytes()
    Path(f"alone/{section}.safetensors").write_bytes(content)
    assert main(["--ckpt", "alone", "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "a first stage, which draws nothing alone" in error


def test_names_stand_once_in_an_error(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.png").write_text("no picture")
    Path("text.safetensors").write_text("no tensors at all")
    for words, name in (
        (["--prompts", "none.txt"], "none.txt"),
        (["--image", "text.png"], "text.png"),
        (["--prompt", "a", "--ckpt", "text.safetensors"], "text.safetensors"),
        (["--prompt", "a", "--tokenizer", "text.safetensors"], "text.safetensors"),
    ):
        assert sample(run_folder, *words) == 2
        error = capsys.readouterr().err
        assert error.count(name) == 1 and "<_io" not in error


def test_a_preset_of_sampling(run_folder: Path) -> None:
    words = ["--prompt", "a", "--out", "a", "sampling=demo", "sampling.steps=26"]
    assert sample(run_folder, *words) == 0
    settings = json.loads(load_png(Path("a/00000.png"))[1]["settings"])["sampling"]
    assert settings["guided_steps"] == 20 and settings["temperature_start"] == 1.2


def test_default_folders_are_numbered_and_given_ones_never_overwritten(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert sample(run_folder, "--prompt", "a", "--seed", "4") == 0
    assert main(["--ckpt", str(run_folder / "checkpoint.safetensors"), "--prompt", "a"]) == 0
    assert {p.name for p in Path("samples").iterdir()} == {"micro-4", "micro-4-2", "micro-0"}
    before = Path("samples/micro-4/00000.png").read_bytes()
    capsys.readouterr()
    assert sample(run_folder, "--prompt", "b", "--out", "samples/micro-4") == 2
    assert "already holds 00000.png" in capsys.readouterr().err
    assert Path("samples/micro-4/00000.png").read_bytes() == before


def test_mask_keeps_pixels_and_tokens(run_folder: Path) -> None:
    original = picture("i.png", SIDE, SIDE)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[3:8, 4:9] = 255  # tokens are 2x2 pixels: rows 1..3 and columns 2..4 are touched
    Image.fromarray(mask).save("m.png")
    words = ["--image", "i.png", "--mask", "m.png", "--prompt", "x"]
    assert sample(run_folder, *words, "--out", "a") == 0
    assert np.array_equal(pixels("a/00000.png")[mask == 0], original[mask == 0])
    assert not np.array_equal(pixels("a/00000.png")[mask > 0], original[mask > 0])

    assert sample(run_folder, *words, "--out", "b", "--no-keep-known") == 0
    module = load_generator(run_folder / "checkpoint.safetensors")
    start = torch.from_numpy(original).permute(2, 0, 1)[None] / 127.5 - 1
    touched = torch.zeros(1, 8, 8, dtype=torch.bool)
    touched[0, 1:4, 2:5] = True
    known = module.first_stage.encode(start)
    tokens = module.sample_tokens(Request(["x"], [0], start=known, mask=touched))
    assert torch.equal(tokens[~touched], known[~touched])
    image = module.first_stage.decode(tokens)[0]
    expected = (image * 127.5 + 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy()
    assert np.array_equal(pixels("b/00000.png"), expected.astype(np.uint8))


def test_outpainting_beyond_the_trained_size(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = picture("i.png", 30, 21)
    mask = np.full((21, 30), 255, np.uint8)
    mask[4:16, 4:20] = 0
    Image.fromarray(mask).save("m.png")
    assert sample(run_folder, "--image", "i.png", "--mask", "m.png", "--out", "a") == 0
    said = capsys.readouterr().out
    assert "30x21, cut or resized to 28x20" in said and "trained on 16x16" in said
    made = pixels("a/00000.png")
    assert made.shape == (20, 28, 3)
    assert np.array_equal(made[4:16, 3:19], original[4:16, 4:20])  # cut by 1 pixel at the left
    assert load_png("a/00000.png")[1]["prompt"] == ""


def test_resized_edits_lose_no_white_pixel(run_folder: Path) -> None:
    picture("i.png", 64, 64)
    mask = np.zeros((64, 64), np.uint8)
    mask[33, 50] = 255
    Image.fromarray(mask).save("m.png")
    words = ["--image", "i.png", "--mask", "m.png", "--size", "16x16", "--out"]
    assert sample(run_folder, *words, "a") == 0
    assert sample(run_folder, *words, "b", "--seed", "5") == 0
    differs = (pixels("a/00000.png") != pixels("b/00000.png")).any(-1)
    assert set(zip(*np.nonzero(differs), strict=True)) <= {(8, 12)}


def test_the_trace_plays_several_samplers(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "a", "--prompt", "b", "sampling.steps=3", "--out", "t"]
    page = ["--trace", "t.html", "--samplers", "own,gibbs,renoise_rand"]
    assert sample(run_folder, *words, *page) == 0
    text, said = Path("t.html").read_text(), capsys.readouterr()
    assert text.count("<canvas") == 12 and "gibbs" in text
    assert "step by step: t.html" in said.out + said.err
    told = json.loads(text.partition("id=data>")[2].partition("</script>")[0])
    assert [len(t["changes"]) for t in told[:3]] == [3, 5, 3]
    assert [t["calls"] for t in told[:3]] == [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3]]
    assert all(0 < mean < 3 for t in told for mean in t["entropy"]["means"])
    assert sample(run_folder, *words[:-1], "u", "--samplers", "eb") == 2
    assert sample(run_folder, *words[:-1], "u", "--trace", "u.html", "--samplers", "margin") == 2
    assert sample(run_folder, *words[:-1], "v", "--trace", "v.html", "--samplers", "margn") == 2
    errors = capsys.readouterr().err
    assert "--samplers needs --trace" in errors and "must not be margin" in errors
    assert "--samplers: sampler.name: expected one of own" in errors
    assert not any(Path(name).exists() for name in ("u", "v", "u.html", "v.html"))


def test_strength_of_variations(run_folder: Path) -> None:
    picture("i.png", 40, 32)
    for strength, first in (("0", 9), ("0.7", 3), ("1", 1)):
        words = ["--image", "i.png", "--out", strength, "sampling.steps=10"]
        assert sample(run_folder, *words, "--strength", strength) == 0
        settings = json.loads(load_png(f"{strength}/00000.png")[1]["settings"])
        assert settings["sampling"]["first_step"] == first
    assert sample(run_folder, "--image", "i.png", "--out", "d", "sampling.steps=10") == 0
    assert np.array_equal(pixels("d/00000.png"), pixels("0.7/00000.png"))
    assert not np.array_equal(pixels("1/00000.png"), pixels("0/00000.png"))
    assert pixels("d/00000.png").shape == (SIDE, SIDE, 3)


def test_interpolation_runs_from_one_prompt_to_the_other(run_folder: Path) -> None:
    words = ["--prompt", "red", "--prompt", "a blue square", "--interpolate", "3"]
    assert sample(run_folder, *words, "--out", "a", "--negative", "no") == 0
    assert sample(run_folder, *words[:2], "--out", "b", "--negative", "no") == 0
    assert sample(run_folder, *words[2:4], "--out", "c", "--negative", "no") == 0
    assert np.array_equal(pixels("a/00000.png"), pixels("b/00000.png"))
    assert np.array_equal(pixels("a/00002.png"), pixels("c/00000.png"))
    text = load_png("a/00001.png")[1]
    settings = json.loads(text["settings"])
    assert (text["seed"], settings["blend"], settings["blend_with"]) == ("0", 0.5, "a blue square")


def test_other_sizes_from_text(run_folder: Path) -> None:
    assert sample(run_folder, "--prompt", "a", "--size", "24x8", "--out", "a") == 0
    assert pixels("a/00000.png").shape == (8, 24, 3)


def test_help_lists_the_checkpoints_settings(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "--interpolate" in said and "sampling.steps=8" in said
    assert sample(run_folder, "--help") == 0
    assert "sampling.steps=3  [int]" in capsys.readouterr().out


WRONG: list[tuple[list[str], str]] = [
    ([], "--prompt is missing"),
    (["--prompt", "a", "--prommpt", "b"], "did you mean --prompt?"),
    (["--prompt"], "expected one argument"),
    (["--prompt", "a", "--seed", "x"], "--seed"),
    (["--prompt", "a", "--seed", "-1"], "--seed must be at least 0"),
    (["--prompt", "a", "--seed", str(2**64 + 1)], "for the first of 1 picture"),
    (["--prompts", "many.txt", "--seed", str(2**32 - 2)], "no picture's seed may exceed"),
    (["--prompts", "nul.txt"], "nul.txt: it holds a NUL"),
    (["--prompt", "a", "--count", "0"], "--count must be at least 1"),
    (["--prompt", "a", "--batch-size", "0"], "--batch-size must be at least 1"),
    (["--prompt", "a", "--device", "abacus"], "--device abacus"),
    (["--prompt", "a", "--out", "text.txt"], "is a file"),
    (["--prompt", "a", "--size", "16"], "must look like 64x32"),
    (["--prompt", "a", "--size", "18x16"], "multiples of 4, got 18x16 (near: 16x16)"),
    (["--prompt", "a", "sampling.stepps=3"], "did you mean sampling.steps"),
    (["--prompt", "a", "steps=3"], "did you mean sampling.steps"),
    (["--prompt", "a", "sampling.steps=0"], "sampling.steps must be at least 1"),
    (["--prompt", "a", "sampling.steps=few"], "sampling.steps: expected int"),
    (["--prompt", "a", "sampling=none"], "not one of paper, released"),
    (["--prompt", "\ud800"], "is no valid text"),
    (["--prompt", "a", "text.width=16"], "text.width is part of the checkpoint"),
    (["--prompt", "a", "junk"], "'junk' is not a setting"),
    (["--prompts", "none.txt"], "none.txt"),
    (["--prompts", "empty.txt"], "holds no prompt"),
    (["--prompts", "i.png"], "i.png"),
    (["--prompt", "a", "--tokenizer", "none.safetensors"], "there is no tokenizer"),
    (["--prompt", "a", "--mask", "m.png"], "--mask needs --image"),
    (["--prompt", "a", "--strength", "0.5"], "--strength belongs to variations"),
    (["--image", "i.png", "--strength", "1.5"], "--strength must be between 0 and 1"),
    (["--image", "none.png"], "there is no picture none.png"),
    (["--image", "text.txt"], "text.txt is no readable JPEG, PNG or WebP"),
    (["--image", "cut.png"], "cut.png is no readable"),
    (["--image", "i.png", "--mask", "text.txt"], "text.txt is no readable"),
    (["--image", "i.png", "--mask", "other.png"], "--mask is 8x8 and --image 16x16"),
    (["--image", "i.png", "--mask", "black.png"], "no white part"),
    (["--image", "dot.png", "--mask", "dot.png"], "needs at least 4x4"),
    (["--image", "i.png", "sampling.steps=1"], "sampling.steps of at least 2"),
    (["--image", "i.png", "--strength", "1", "sampling.first_step=1"], "exclude each other"),
    (["--prompt", "a", "--interpolate", "4"], "exactly two prompts, got 1"),
    (["--prompt", "a", "--prompt", "b", "--interpolate", "1"], "--interpolate must be at least 2"),
    (["--prompt", "a", "--prompt", "b", "--interpolate", "3", "--count", "2"], "no --count"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda v: " ".join(v)[:40])
def test_wrong_words_are_one_line(
    run_folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    picture("i.png", SIDE, SIDE)
    picture("other.png", 8, 8)
    picture("dot.png", 3, 3)
    Image.new("RGB", (SIDE, SIDE)).save("black.png")
    Path("cut.png").write_bytes(Path("i.png").read_bytes()[:200])
    Path("text.txt").write_text("no picture")
    Path("empty.txt").write_text("\n \n")
    Path("many.txt").write_text("a\nb\nc\n")
    Path("nul.txt").write_text("a\0b\n")
    assert sample(run_folder, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not Path("samples").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.safetensors", "there is no checkpoint"),
        ("folder", "there is no checkpoint"),
        ("tokenizer.safetensors", "is a checkpoint of vqgan"),
        ("bare.safetensors", "experiments.convert"),
        ("text.safetensors", "is no readable checkpoint"),
        ("text.pt", "is no checkpoint that can be read safely"),
        ("middle.safetensors", "beside it names its first stage"),
        ("strange.safetensors", "has no setting 'stepz'"),
        ("broken.safetensors", "broken.json is no readable JSON"),
        ("alone.safetensors", "name it with --tokenizer"),
        ("odd.safetensors", "is not the first stage that"),
        ("short.safetensors", "does not fit PaellaModule"),
    ],
)
def test_wrong_checkpoints(
    run_folder: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state, config = load_weights(run_folder / "checkpoint.safetensors")
    tokenizer = run_folder / "tokenizer.safetensors"
    Path("folder").mkdir()
    Path("tokenizer.safetensors").write_bytes(tokenizer.read_bytes())
    Path("text.safetensors").write_text("no tensors at all")
    Path("text.pt").write_text("no tensors at all")
    save_file({"a": torch.zeros(1)}, "bare.safetensors")
    weights, settings = load_weights(tokenizer)
    save_weights("other.safetensors", {k: v + 1 for k, v in weights.items()}, settings)
    for case, beside in {
        "middle": None,
        "alone": {"first_stage": {**named(tokenizer), "file": "gone"}},
        "odd": {"first_stage": {**named(tokenizer), "file": "other.safetensors"}},
        "strange": {"first_stage": named(tokenizer), "sampling": {"stepz": 3}},
        "broken": {"first_stage": named(tokenizer)},
    }.items():
        save_weights(f"{case}.safetensors", state, config)
        if beside is not None:
            write_json(Path(f"{case}.json"), beside)
    Path("broken.json").write_text("{")
    save_weights("short.safetensors", dict(list(state.items())[1:]), config)
    write_json(Path("short.json"), {"first_stage": named(tokenizer)})
    assert main(["--ckpt", name, "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_tokenizer_from_elsewhere(run_folder: Path) -> None:
    for name in ("checkpoint.safetensors", "checkpoint.json"):
        Path(name).write_bytes((run_folder / name).read_bytes())
    words = ["--ckpt", "checkpoint.safetensors", "--prompt", "a", "--out", "a"]
    assert main(words) == 2
    assert main([*words, "--tokenizer", str(run_folder / "tokenizer.safetensors")]) == 0
    assert sample(run_folder, "--prompt", "a", "--out", "b") == 0
    assert np.array_equal(pixels("a/00000.png"), pixels("b/00000.png"))


# Folders of earlier versions ----


def test_an_old_run_folder_with_all_settings_inside(run_folder: Path) -> None:
    """Before there was a checkpoint.json, the checkpoint held its tokenizer and its sampling."""
    Path("old").mkdir()
    tokenizer = Path("old/tokenizer.safetensors")
    tokenizer.write_bytes((run_folder / tokenizer.name).read_bytes())
    state, config = load_weights(run_folder / "checkpoint.safetensors")
    inside = {**config, "tokenizer": named(tokenizer), "sampling": SAMPLING}
    save_weights("old/checkpoint.safetensors", state, inside)
    words = ["--prompt", "a red circle", "--prompt", "b", "--out"]
    assert sample(Path("old"), *words, "a") == sample(run_folder, *words, "b") == 0
    for i in range(2):
        assert np.array_equal(pixels(f"a/0000{i}.png"), pixels(f"b/0000{i}.png"))
    assert json.loads(load_png("a/00000.png")[1]["settings"])["sampling"]["steps"] == 3


def test_an_old_run_folder_of_two_joined_stages() -> None:
    """Super-resolution once lay in the base's file, as superres.* tensors."""
    superres = {
        "enabled": True,
        "model": {**MUSE, "low_num_codes": 12, "low_layers": 1, "low_max_side": 4, "block": 2},
    }
    sampling = {"steps": 3, "superres": {"steps": 2}}
    high = {"grid": [8, 8], "num_codes": 12}
    parts: Any = tiny("muse", superres=superres, high=high, sampling=sampling)
    tokenizer = VQGANModule({"model": TOKENIZER, "objective": {"disc_weight": 0.0}})
    for parameter in [*tokenizer.parameters(), *parts.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)
    for folder in ("old", "new"):
        save_weights(f"{folder}/tokenizer.safetensors", *tokenizer.export())
    own = named(Path("old/tokenizer.safetensors"))
    base_state, config = tiny("muse", sampling={}).export()
    base_state = {k: v for k, v in parts.state_dict().items() if k in base_state}
    state, settings = parts.superres.export()
    joined = {**base_state, **{f"superres.{k}": v for k, v in state.items()}}
    inside = {
        **config,
        "tokenizer": own,
        "sampling": {**config["sampling"], **sampling},
        "superres": superres,
        "high": high,
    }
    save_weights("old/checkpoint.safetensors", joined, inside)

    save_weights("new/checkpoint.safetensors", base_state, config)
    save_weights("new/superres.safetensors", state, settings)
    part = {"superres": named(Path("new/superres.safetensors"))}
    write_json(
        Path("new/checkpoint.json"), {"first_stage": own, "parts": part, "sampling": sampling}
    )
    for folder in ("old", "new"):
        assert sample(Path(folder), "--prompt", "a red circle", "--out", f"of-{folder}") == 0
    assert pixels("of-old/00000.png").shape == (16, 16, 3)
    assert np.array_equal(pixels("of-old/00000.png"), pixels("of-new/00000.png"))


# A run's own pictures ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run at scale micro: its folder, and that of its pictures for val."""
    root = tmp_path_factory.mktemp("trained")
    words = ["logger=csv", f"cache={root / 'cache'}", "eval.heldout=0", "trainer.max_steps=4"]
    settings = load("paella", "micro", words)
    execute(Titles("paella", "micro", "run"), settings, root / "run", lambda line: None)
    (pictures,) = (root / "cache").glob("sample-val-*")
    return root / "run", pictures


def test_sample_draws_the_runs_own_pictures(trained: tuple[Path, Path]) -> None:
    """Whole batches of one shape and order give the same bytes; singles agree up to float ties."""
    out, folder = trained
    asked = json.loads((folder / "prompts.json").read_text())
    theirs = [pixels(str(folder / row["file"])) for row in asked]
    assert [row["seed"] for row in asked] == list(range(16))
    assert json.loads((out / "checkpoint.json").read_text())["data"] == "scenes"
    Path("prompts.txt").write_text("\n".join(row["prompt"] for row in asked), encoding="utf-8")
    words = ["--prompts", "prompts.txt", "--out"]
    assert sample(out, *words, "whole", "--batch-size", "16") == 0
    for row, picture in zip(asked, theirs, strict=True):
        assert np.array_equal(pixels(f"whole/{row['file']}"), picture)
    assert sample(out, *words, "single", "--batch-size", "1") == 0
    same = [
        np.array_equal(pixels(f"single/{row['file']}"), p)
        for row, p in zip(asked, theirs, strict=True)
    ]
    print(f"{sum(same)} of {len(same)} pictures drawn alone have the bytes of the run")
    assert sum(same) >= 12

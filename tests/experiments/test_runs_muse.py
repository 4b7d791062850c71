"""Whole runs of Muse at scale micro: both stages, what depends on what, edits, files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments.config import ConfigError, UserError, load
from experiments.pictures import load_png
from experiments.upscale import PairData, high_data

from data.scenes import scenes
from experiments import sample, stages
from lightning_modules.common.checkpoint import load_weights
from lightning_modules.muse.module import MuseModule
from lightning_modules.registry import load_generator, load_tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:The dirpath has changed", "ignore:Your `IterableDataset`"
)


def plan(*words: str) -> dict[str, str]:
    return {s.name: s.key for s in stages.plan("muse", load("muse", "micro", words))}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def go(cache: Path, out: Path, *words: str) -> tuple[dict[str, Any], list[str]]:
    """Do a run; returns its scores and what was said."""
    lines: list[str] = []
    config = load("muse", "micro", ["logger=csv", f"cache={cache}", *words])
    outcome = stages.run("muse", "micro", config, out, command="run muse", say=lines.append)
    return outcome.scores, lines


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "muse"
    return out, go(cache, out)[0]


def folder(cache: Path, name: str, *words: str) -> Path:
    return cache / f"{name}-{plan(*words)[name]}"


def test_stages_in_their_order() -> None:
    both = ["data", "tokenizer", "cache", "train", "pairs", "superres", "joined", "sample", "edits",
            "score", "report"]  # fmt: skip
    assert list(plan()) == both
    base = [n for n in both if n not in ("pairs", "superres", "joined")]
    assert list(plan("superres.enabled=false")) == base
    assert "edits" not in plan("eval.edits=0")


def test_what_depends_on_what() -> None:
    def changed(*words: str, without: tuple[str, ...] = ()) -> set[str]:
        first, second = plan(*without), plan(*without, *words)
        return {name for name in first if first[name] != second[name]}

    drawn = {"sample", "edits", "score", "report"}
    assert changed("sampling.superres.steps=3") == drawn
    assert changed("superres.optim.lr=0.002") == {"superres", "joined", *drawn}
    assert changed("superres_trainer.max_steps=9") == {"superres", "joined", *drawn}
    assert changed("optim.lr=0.002") == {"train", "superres", "joined", *drawn}
    # with the pictures' own low-res tokens the two stages are trained apart
    real = ("superres.low=real",)
    assert changed("optim.lr=0.002", without=real) == {"train", "joined", *drawn}
    assert changed("eval.edits=2") == {"edits", "score", "report"}
    assert changed("superres.factor=4", "superres.model.max_side=32") == {
        "pairs", "superres", "joined", *drawn
    }  # fmt: skip


def test_scores_of_both_stages_and_of_edits(run: tuple[Path, dict[str, Any]]) -> None:
    out, scores = run
    for name in ("eval", "eval/heldout", "superres", "superres/heldout"):
        score = scores[f"{name}/scene_accuracy"]
        assert score["n"] == 16
        how = "64 px, reduced to 32 px by area averaging" if "superres" in name else None
        assert score.get("pictures") == how
    assert scores["edit/object_accuracy"]["n"] == 4
    assert "superres/scene_accuracy" in json.loads((out / "metrics.json").read_text())
    page = (out / "report.html").read_text()
    shown = ("Super-resolution: val, reduced", "Edits: the picture", "superres train",
             "of which up to 50% were predicted by the base")  # fmt: skip
    for words in shown:
        assert words in page


def test_pictures_of_both_stages(run: tuple[Path, dict[str, Any]], cache: Path) -> None:
    drawn = folder(cache, "sample")
    for i in (0, 31):
        assert load_png(drawn / f"{i:05d}.png")[0].shape == (3, 64, 64)
        assert load_png(drawn / f"base-{i:05d}.png")[0].shape == (3, 32, 32)
    card, _ = load_png(folder(cache, "edits") / "card-00000.png")
    assert card.shape == (3, 64, 192)
    assert bool((card[:, :, 64:128] == 128).all(0).any())  # what was masked is grey


def test_the_checkpoint_holds_both_stages(run: tuple[Path, dict[str, Any]], cache: Path) -> None:
    out, _ = run
    module = load_generator(out / "checkpoint.safetensors")
    assert isinstance(module, MuseModule) and module.superres is not None and module.critic
    base, _ = load_weights(folder(cache, "train") / "checkpoint.safetensors")
    state = module.state_dict()
    assert all(torch.equal(state[k], v) for k, v in base.items())
    stage, _ = load_weights(folder(cache, "superres") / "superres.safetensors")
    assert all(torch.equal(state[f"superres.{k}"], v) for k, v in stage.items())
    first = load_png(folder(cache, "sample") / "00000.png")
    image = module.sample([first[1]["prompt"]], seeds=[int(first[1]["seed"])])
    assert torch.equal((image[0] * 127.5 + 127.5).round().clamp(0, 255).byte(), first[0])


def test_a_second_run_reuses_everything(
    run: tuple[Path, dict[str, Any]], cache: Path, tmp_path: Path
) -> None:
    scores, lines = go(cache, tmp_path / "again")
    assert scores == run[1]
    assert sum("reused" in line for line in lines) == len(plan())


def test_pairs_are_of_the_same_pictures(run: tuple[Path, dict[str, Any]], cache: Path) -> None:
    config = load("muse", "micro", [f"cache={cache}"])
    data: Any = PairData(
        folder(cache, "pairs"), None, {"high": {}, "low": {}}, batch_size=8, seed=3
    )  # type: ignore[arg-type]
    tokenizer = load_tokenizer(folder(cache, "tokenizer") / "tokenizer.safetensors")
    size = high_data(config).resolution  # type: ignore[arg-type]
    known = {s["key"]: s["image"] for s in scenes("train", 64, resolution=size)}
    for batch in data.stream():
        pixels = torch.stack([torch.from_numpy(known[k]) for k in batch["key"]])
        images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        small = torch.nn.functional.avg_pool2d(images, 2)
        assert torch.equal(batch["tokens"], tokenizer.encode(images))
        assert float((batch["low"] == tokenizer.encode(small)).float().mean()) > 0.99
        break


def test_pictures_are_encoded_as_they_come(
    cache: Path, run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    words = (
        "data.cache=false",
        "superres.low=real",
        "eval.edits=0",
        "superres_trainer.max_steps=2",
    )
    scores = go(cache, tmp_path / "run", *words)[0]
    assert "superres/scene_accuracy" in scores and "edit/object_accuracy" not in scores
    assert not (folder(cache, "pairs", *words) / "high").exists()  # whatever the trainer


def test_a_tokenizer_of_its_own(
    cache: Path, run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Another file for the larger pictures travels beside the checkpoint."""
    out, _ = run
    state, config = load_weights(out / "tokenizer.safetensors")
    from lightning_modules.common.checkpoint import save_weights

    other = tmp_path / "other.safetensors"
    save_weights(other, state, {**config, "note": "the same weights in another file"})
    words = (f"superres.tokenizer={other}", "eval.edits=0", "superres_trainer.max_steps=2")
    go(cache, tmp_path / "run", *words)
    module: Any = load_generator(tmp_path / "run" / "checkpoint.safetensors")
    assert module.superres.tokenizer is not module.tokenizer
    (tmp_path / "run" / "high.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs its tokenizer high\.safetensors"):
        load_generator(tmp_path / "run" / "checkpoint.safetensors")


WRONG = [
    (["model.text_width=8"], "model.text_width must be text.width"),
    (["superres.model.text_width=8"], "superres.model.text_width must be text.width"),
    (["superres.model.num_codes=33"], "superres.model.num_codes must be the tokenizer's 32"),
    (["superres.model.low_num_codes=33"], "superres.model.low_num_codes must be"),
    (["superres.model.block=5"], "data.resolution must be a multiple of 20"),
    (["superres.model.max_side=8"], "superres.model.max_side must be at least the token grid's 16"),
    (["superres.model.low_max_side=4"], "low_max_side must be at least the token grid's 8"),
    (["model.max_side=4"], "model.max_side must be at least the token grid's 8"),
    (
        ["network=uvit", "uvit.codebook_size=32", "critic.layers=0"],
        "uvit.encoder_hidden_size must be text.width",
    ),
    (["network=uvit", "uvit.codebook_size=32", "text.name=t5"], "network=uvit needs states and a"),
    (["sampling.superres.top_k=0"], "sampling.superres.top_k must be at least 1"),
    (["sampling.edit.share=0"], "sampling.edit.share must be in"),
    (["superres.low=both"], "superres.low: expected one of real, predicted"),
    (["eval.edits=17"], "eval.edits must be at most data.val_size"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=str)
def test_what_does_not_fit_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("muse", "micro", words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_named() -> None:
    with pytest.raises(UserError, match=r"superres\.tokenizer: there is no file none"):
        plan("superres.tokenizer=none.safetensors")


def test_the_paper_has_the_sizes_of_its_tables() -> None:
    config: Any = load("muse", "paper")
    assert (config.model.layers, config.model.hidden, config.model.mlp) == (48, 2048, 8192)
    stage = config.superres.model
    assert (stage.low_layers, stage.layers, stage.hidden, stage.mlp) == (16, 32, 1024, 4096)
    machine = config.trainer
    assert machine.batch_size * machine.devices * machine.num_nodes == 512
    assert config.sampling.steps == 24 and config.sampling.superres.steps == 8
    load("muse", "paper", ["model=632m", "superres.model=268m"])
    amused = ["network=uvit", "uvit=amused-512", "text=clip", "text.projected=true"]
    load("muse", "paper", [*amused, "superres.enabled=false"])


# Edits from the command line ----


def test_edits_by_hand(
    run: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, _ = run

    def draw(*words: str) -> int:
        return sample.main(["--ckpt", str(out), "--device", "cpu", "--prompt", "a", *words])

    assert draw("--out", "0") == 0
    given = "0/00000.png"
    assert draw("--image", given, "--expand", "0,0,32,16", "--out", "1") == 0
    wide, text = load_png("1/00000.png")
    assert wide.shape == (3, 80, 96) and json.loads(text["settings"])["expand"] == "0,0,32,16"
    assert torch.equal(wide[:, :64, :64], load_png(given)[0])  # what was there stays
    assert draw("--image", given, "--edit", "--out", "2", "sampling.edit.iterations=2") == 0
    edited, text = load_png("2/00000.png")
    assert edited.shape == (3, 64, 64) and json.loads(text["settings"])["edit"] is True
    assert draw("--image", given, "--edit", "--out", "3", "sampling.edit.iterations=2") == 0
    assert torch.equal(load_png("3/00000.png")[0], edited)
    assert draw("--size", "96x64", "--out", "4") == 0
    assert load_png("4/00000.png")[0].shape == (3, 64, 96)


WRONG_WORDS = [
    (["--edit"], "--edit needs --image"),
    (["--expand", "0,0,16,0"], "--expand needs --image"),
    (["--image", "i.png", "--edit", "--expand", "0,0,16,0"], "--expand and --edit exclude each"),
    (["--image", "i.png", "--expand", "0,0,16"], "--expand must look like"),
    (["--image", "i.png", "--expand", "0,0,3,0"], "multiples of 16"),
    (["--image", "i.png", "--expand", "0,0,0,0"], "one must grow"),
    (["--image", "i.png", "--expand", "0,0,-16,0"], "no side may shrink"),
    (["--image", "i.png", "--edit", "--strength", "0.5"], "--strength belongs to variations"),
]


@pytest.mark.parametrize(("words", "message"), WRONG_WORDS, ids=str)
def test_wrong_edits_are_one_line(
    words: list[str], message: str, run: tuple[Path, dict[str, Any]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("i.png")
    assert sample.main(["--ckpt", str(run[0]), "--prompt", "a", *words, "--out", "x"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("x").exists()

"""Whole runs of Muse at scale micro: both stages, what depends on what, edits, files."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.scenes import scenes
from data.tokens import TokenData
from experiments import sample
from experiments.cli import command
from experiments.papers.registry import load
from experiments.report.pictures import load_png, to_uint8
from lightning_modules.common.checkpoint import load_weights, save_weights
from lightning_modules.common.request import Request
from lightning_modules.muse.module import MuseModule
from lightning_modules.registry import load_first_stage, load_generator
from tests import micro_runs
from tests.micro_runs import QUIET, Run, refused

pytestmark = pytest.mark.filterwarnings(*QUIET)
names, changed = partial(micro_runs.names, "muse"), partial(micro_runs.changed, "muse")
SPLITS = ("val", "heldout", "partial")
ENLARGED = {f"{what}sample-superres-{split}" for what in ("", "features-") for split in SPLITS}
FINAL = ENLARGED | {"edits", "features-edits", "score"}
BASE = {f"{what}sample-{split}" for what in ("", "features-") for split in SPLITS}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("muse")
    return micro_runs.go("muse", root / "run", root / "cache")


def test_what_stages_there_are() -> None:
    both = names()
    assert (both.count("encode"), both.count("generator"), both.count("superres")) == (2, 2, 1)
    assert {*ENLARGED, *BASE, "edits"} <= set(both)
    alone = names("superres.enabled=false")
    assert (alone.count("encode"), alone.count("generator")) == (1, 1)
    assert not [name for name in alone if "superres" in name] and "edits" in alone
    assert not [name for name in names("eval.edits=0") if "edits" in name]


def test_what_depends_on_what() -> None:
    enlarging = {"superres", "generator", *FINAL}
    assert changed("sampling.superres.steps=3") == FINAL  # the base's pictures stay
    assert changed("superres.optim.lr=0.002") == enlarging
    assert changed("superres_trainer.max_steps=9") == enlarging
    assert changed("optim.lr=0.002") == {"train", *BASE, *enlarging}
    # with the pictures' own low-res tokens the two stages are trained apart
    real = ("superres.low=real",)
    assert changed("optim.lr=0.002", given=real) == {"train", "generator", *BASE, *FINAL}
    assert not changed("sampling.edit.iterations=2")  # edits of a run have a mask
    assert not changed("sampling.superres.steps=3", given=("superres.enabled=false",))
    assert changed("eval.edits=2") == {"edits", "features-edits", "score"}
    wider = changed("superres.factor=4", "superres.model.max_side=32")
    assert {"encode", *enlarging} <= wider and not {"train", "tokenizer", *BASE} & wider


def test_scores_of_both_stages_and_of_edits(run: Run) -> None:
    for prefix in ("eval", "eval/heldout", "superres", "superres/heldout"):
        score = run.scores[f"{prefix}/scene_accuracy"]
        assert score["n"] == 16
        how = "reduced to 32 px by area averaging" if "superres" in prefix else None
        assert score.get("pictures") == how
    assert run.scores["edit/object_accuracy"]["n"] == 4
    shown = (
        "Super-resolution: val, reduced",
        "Edits: the picture",
        "superres train",
        "of which up to 50% are predicted by the base",
    )
    for words in shown:
        assert words in run.page


def test_pictures_of_both_stages(run: Run) -> None:
    assert run.pictures("superres/heldout").shape == (16, 3, 64, 64)
    assert run.pictures("eval/heldout").shape == (16, 3, 32, 32)
    triple, _ = load_png(run.folder("edits") / "triple-00000.png")
    assert triple.shape == (3, 64, 192)
    assert bool((triple[:, :, 64:128] == 128).all(0).any())  # what was masked is grey


@pytest.mark.bits
def test_the_checkpoint_holds_both_stages(run: Run) -> None:
    module = load_generator(run.out)
    assert isinstance(module, MuseModule) and module.superres is not None and module.critic
    state = module.state_dict()
    for name, before in (("train/checkpoint", ""), ("superres/superres", "superres.")):
        stage, _, file = name.partition("/")
        for key, value in load_weights(run.folder(stage) / f"{file}.safetensors")[0].items():
            assert torch.equal(state[f"{before}{key}"], value)
    asked = run.asked("superres")  # one whole batch, since bits hang on its shape
    request = Request([row["prompt"] for row in asked], [row["seed"] for row in asked])
    assert torch.equal(to_uint8(module.sample(request)), run.pictures("superres"))


def test_a_second_run_reuses_everything(run: Run, tmp_path: Path) -> None:
    again = micro_runs.go("muse", tmp_path / "again", run.cache)
    assert again.scores == run.scores and not again.made()


def test_pairs_are_of_the_same_pictures(run: Run) -> None:
    pairs = run.plan.samples["superres"].generator.parts["superres"].source
    tokenizer = load_first_stage(run.folder("tokenizer") / "first_stage.safetensors")
    known = {s["key"]: s["image"] for s in scenes("train", 64, resolution=64)}
    batch = next(iter(TokenData(run.folder(pairs), batch_size=8, seed=3).stream()))
    images = torch.stack([pixels(known[key]) for key in batch["key"]])
    assert torch.equal(batch["tokens"], tokenizer.encode(images))
    small = torch.nn.functional.avg_pool2d(images, 2)
    assert float((batch["low"] == tokenizer.encode(small)).float().mean()) > 0.99


def pixels(image: Any) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1


def test_pictures_are_encoded_as_they_come(run: Run, tmp_path: Path) -> None:
    words = (
        "data.cache=false",
        "superres.low=real",
        "eval.edits=0",
        "superres_trainer.max_steps=2",
    )
    assert "encode" not in names(*words)
    scores = micro_runs.go("muse", tmp_path / "run", run.cache, *words).scores
    assert "superres/scene_accuracy" in scores and "edit/object_accuracy" not in scores


def test_a_tokenizer_of_its_own(run: Run, tmp_path: Path) -> None:
    """Another file for the larger pictures travels beside the checkpoint."""
    state, config = load_weights(run.out / "tokenizer.safetensors")
    other = tmp_path / "other.safetensors"
    save_weights(other, state, {**config, "note": "the same weights in another file"})
    words = (f"superres.tokenizer={other}", "eval.edits=0", "superres_trainer.max_steps=2")
    out = micro_runs.go("muse", tmp_path / "run", run.cache, *words).out
    module: Any = load_generator(out)
    assert module.superres.first_stage is not module.first_stage
    (out / "high.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*high\.safetensors"):
        load_generator(out)


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
    assert message in refused(lambda: load("muse", "micro", words))


def test_a_missing_tokenizer_is_named() -> None:
    wrong = refused(lambda: names("superres.tokenizer=none.safetensors"))
    assert "superres.tokenizer: there is no file none" in wrong


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


def test_edits_by_hand(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def draw(*words: str) -> int:
        return command(
            sample.run, ["--ckpt", str(run.out), "--device", "cpu", "--prompt", "a", *words]
        )

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
    words: list[str],
    message: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("i.png")
    assert command(sample.run, ["--ckpt", str(run.out), "--prompt", "a", *words, "--out", "x"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("x").exists()

"""Whole runs of VQ-Diffusion and Improved VQ-Diffusion at scale micro: one model, two papers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments.config import ConfigError, load
from torch import Tensor

from experiments import sample, stages
from experiments.store import Store
from lightning_modules.common.checkpoint import load_weights
from lightning_modules.registry import load_generator

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:The dirpath has changed", "ignore:Your `IterableDataset`"
)
CLASSES = ["model.condition=class", "data=digits", "data.train_size=64"]
ZERO_SHOT = ["init.train=false", "null_condition=empty"]


class Runs:
    """Runs that share a cache, by name."""

    def __init__(self, root: Path) -> None:
        self.root, self.lines = root, dict[str, list[str]]()

    def words(self, *words: str) -> list[str]:
        return ["logger=csv", *words, f"cache={self.root / 'cache'}"]

    def go(self, name: str, paper: str, *words: str) -> Path:
        config, lines = load(paper, "micro", self.words(*words)), list[str]()
        out = self.root / name
        stages.run(paper, "micro", config, out, command=name, say=lines.append)
        self.lines[name] = lines
        return out

    def reused(self, name: str) -> set[str]:
        lines = [line.partition("] ")[2] for line in self.lines[name]]
        return {line.partition(":")[0] for line in lines if ": reused" in line}

    def samples(self, paper: str, *words: str) -> Path:
        plan = {s.name: s for s in stages.plan(paper, load(paper, "micro", self.words(*words)))}
        return Store(self.root / "cache").folder(plan["sample"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("runs"))
    made.go("plain", "vq_diffusion")
    return made


def scores(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())


def pixels(folder: Path, start: str = "") -> list[bytes]:
    return [p.read_bytes() for p in sorted(folder.glob(f"{start}0*.png"))]


def weights(out: Path) -> dict[str, Tensor]:
    return load_weights(out / "checkpoint.safetensors")[0]


def test_both_papers_are_scored_from_one_checkpoint(runs: Runs) -> None:
    out = runs.go("improved", "improved_vqd")
    found = scores(out)
    names = [n.removeprefix("eval/") for n in found if n.startswith("eval/")]
    assert "scene_accuracy" in names and "heldout/fd_scenes" in names
    assert [n for n in found if n.startswith("vq_diffusion/")] == [
        f"vq_diffusion/{n}" for n in names
    ]
    assert next(iter(found)).startswith("eval/")
    alone = runs.go("alone", "improved_vqd", "sampling.compare=false")
    assert runs.reused("alone") == {"data", "tokenizer", "cache", "train"}
    assert {k: v for k, v in scores(alone).items() if "vq_diffusion" not in k} == {
        k: v for k, v in found.items() if not k.startswith("vq_diffusion/")
    }


def test_a_plain_model_is_guided_without_training(runs: Runs) -> None:
    """The pictures beside are those of the plain run itself."""
    plain = runs.root / "plain"
    out = runs.go("zero", "improved_vqd", f"init.ckpt={plain}", *ZERO_SHOT)
    mine, theirs = weights(out), weights(plain)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    folder = runs.samples("improved_vqd", f"init.ckpt={plain}", *ZERO_SHOT)
    beside, drawn = pixels(folder, "vq_diffusion-"), pixels(folder)
    assert len(beside) == len(drawn) == 32
    assert beside == pixels(runs.samples("vq_diffusion")) != drawn
    assert scores(out)["vq_diffusion/scene_accuracy"] == scores(plain)["eval/scene_accuracy"]

    module = load_generator(plain / "checkpoint.safetensors", paper="improved_vqd")
    trained = load_generator(out / "checkpoint.safetensors")
    assert module.config.null_condition.name == trained.config.null_condition.name == "empty"
    asked = {"seeds": [0, 1], "steps": 4, "guidance": 3.0, "truncation": 1.0}
    tokens = [m.sample_tokens(["a red circle", "x"], **asked) for m in (module, trained)]
    assert torch.equal(*tokens)
    with pytest.raises(
        ValueError, match="a checkpoint of vq_diffusion, which paella cannot sample"
    ):
        load_generator(plain / "checkpoint.safetensors", paper="paella")


def test_sample_takes_a_plain_model_as_an_improved_one(runs: Runs, tmp_path: Path) -> None:
    plain = runs.root / "plain"
    words = ["--ckpt", str(plain), "--prompt", "a red circle", "--device", "cpu", "--seed", "3"]
    for name, more in {
        "plain": [], "guided": ["--paper", "improved_vqd", "sampling.guidance=4"],
        "one": ["--paper", "improved_vqd", "sampling=plain", "sampling.steps=4"],
    }.items():  # fmt: skip
        assert sample.main([*words, *more, "--out", str(tmp_path / name)]) == 0
    drawn = {p.name: pixels(p)[0] for p in tmp_path.iterdir()}
    assert drawn["guided"] != drawn["one"]
    assert sample.main([*words, "--paper", "muse", "--out", str(tmp_path / "x")]) == 2


def test_fine_tuning_depends_on_what_it_starts_from(runs: Runs, tmp_path: Path) -> None:
    plain = runs.root / "plain"
    start = f"init.ckpt={plain}"
    out = runs.go("tuned", "improved_vqd", start, "optim.lr=1e-9")
    assert runs.reused("tuned") == {"data", "tokenizer", "cache"}
    before, after = weights(plain), weights(out)
    assert after.keys() - before.keys() == {"null"}
    for key, value in before.items():
        if key.startswith("network."):
            torch.testing.assert_close(after[key], value, atol=1e-6, rtol=0)
    assert after["loss_count"].sum() > before["loss_count"].sum()  # it was trained all the same

    def train_key(*words: str) -> str:
        plan = stages.plan("improved_vqd", load("improved_vqd", "micro", runs.words(*words)))
        return next(s.key for s in plan if s.name == "train")

    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((plain / "checkpoint.safetensors").read_bytes())
    keys = [train_key(f"init.ckpt={copy}")]
    copy.write_bytes((out / "checkpoint.safetensors").read_bytes())
    keys += [train_key(f"init.ckpt={copy}"), train_key()]
    assert len({*keys, train_key(start)}) == 4  # the file's place counts, and what is in it
    with pytest.raises(ConfigError, match=r"init\.ckpt: there is no file nowhere"):
        load("improved_vqd", "micro", ["init.ckpt=nowhere"])


@pytest.mark.parametrize(("paper", "rows"), [("vq_diffusion", 10), ("improved_vqd", 11)])
def test_digits_by_their_class(runs: Runs, paper: str, rows: int) -> None:
    words = [*CLASSES, f"model.class_number={rows}"]
    found = scores(runs.go(f"digits-{paper}", paper, *words))
    prefixes = {"vq_diffusion": ["eval"], "improved_vqd": ["eval", "vq_diffusion"]}[paper]
    for prefix in prefixes:
        assert 0 <= found[f"{prefix}/digit_accuracy"]["value"] <= 1
    module = load_generator(runs.root / f"digits-{paper}" / "checkpoint.safetensors")
    one, two = (
        module.sample_tokens(["7"], seeds=[0]),
        module.sample_tokens([""], seeds=[0], labels=[7]),
    )
    assert torch.equal(one, two) and module.text_encoder is None


def test_written_token_by_token(runs: Runs) -> None:
    """VQ-AR, the baseline of the same size, through the same stages."""
    out = runs.go("causal", "vq_diffusion", "model.causal=true")
    assert "eval/scene_accuracy" in scores(out)
    assert weights(out).keys() == weights(runs.root / "plain").keys()


WRONG = [
    ("vq_diffusion", ["sampling.steps=11"], r"sampling\.steps must be at most .* \(10\), got 11"),
    ("vq_diffusion", ["model.num_codes=33"], r"model\.num_codes must be the tokenizer's 32 codes"),
    ("vq_diffusion", ["model.condition_dim=8"], r"model\.condition_dim must be text\.width \(16\)"),
    ("vq_diffusion", ["model.condition=class"], "must be text with data=scenes, got class"),
    ("vq_diffusion", ["model.spatial_size=[2,8]"], r"must have places for 8x8 tokens"),
    ("vq_diffusion", [*CLASSES, "classes=[a]"], r"classes must name all 1000 classes or none"),
    ("improved_vqd", [*CLASSES, "classes=[a]"], r"classes must name all 999 classes or none"),
    ("improved_vqd", ["init.train=false"], r"init\.train must be true without ckpt"),
    ("improved_vqd", ["sampling.reveal=constant"], r"sampling\.tokens_per_call must be set"),
    ("improved_vqd", ["sampling.reveal=released"], r"sampling\.reveal=released knows 1024 tokens"),
    ("vq_diffusion", ["schedule.mask_rate=1.5"], r"schedule\.mask_rate must be between 0 and 1"),
]


@pytest.mark.parametrize(("paper", "words", "message"), WRONG, ids=lambda v: str(v)[:40])
def test_settings_that_do_not_fit(paper: str, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(paper, "micro", words)

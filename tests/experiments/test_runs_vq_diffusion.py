"""Whole runs of VQ-Diffusion and Improved VQ-Diffusion at scale micro: one model, two papers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments import sample
from experiments.cli import command
from experiments.papers.registry import load
from experiments.settings import ConfigError
from lightning_modules.common.checkpoint import load_weights
from lightning_modules.common.request import Request
from lightning_modules.registry import load_generator
from tests import micro_runs
from tests.micro_runs import QUIET, Run, refused, stages

pytestmark = pytest.mark.filterwarnings(*QUIET)
CLASSES = ["model.condition=class", "data=digits", "data.train_size=64"]
ZERO_SHOT = ["init.train=false", "null_condition=empty"]
FIRST = {"data-train", "data-val", "tokenizer", "encode", "train"}


class Runs:
    """Runs that share a cache."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.plain = self.go("plain", "vq_diffusion")

    def go(self, name: str, paper: str, *words: str) -> Run:
        return micro_runs.go(paper, self.root / name, self.root / "cache", *words)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def weights(run: Run) -> dict[str, Tensor]:
    return load_weights(run.out / "checkpoint.safetensors")[0]


def test_both_papers_are_scored_from_one_checkpoint(runs: Runs) -> None:
    found = runs.go("improved", "improved_vqd").scores
    names = [n.removeprefix("eval/") for n in found if n.startswith("eval/")]
    assert "scene_accuracy" in names and "heldout/fd_scenes" in names
    beside = [n.removeprefix("vq_diffusion/") for n in found if n.startswith("vq_diffusion/")]
    assert sorted(beside) == sorted(names)
    assert next(iter(found)).startswith("eval/")
    alone = runs.go("alone", "improved_vqd", "sampling.compare=false")
    assert not FIRST & alone.made()
    # that nothing is drawn beside changes nothing of its own
    assert alone.scores == {k: v for k, v in found.items() if not k.startswith("vq_diffusion/")}
    # nor are its own pictures drawn for it again
    assert alone.made() == {"score"}


def test_a_plain_model_is_guided_without_training(runs: Runs) -> None:
    """The pictures beside are those of the plain run itself."""
    plain = runs.plain
    zero = runs.go("zero", "improved_vqd", f"init.ckpt={plain.out}", *ZERO_SHOT)
    mine, theirs = weights(zero), weights(plain)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    beside = zero.pictures("vq_diffusion")
    assert torch.equal(beside, plain.pictures()) and not torch.equal(beside, zero.pictures())
    assert zero.scores["vq_diffusion/scene_accuracy"] == plain.scores["eval/scene_accuracy"]

    module = load_generator(plain.out, paper="improved_vqd")
    trained = load_generator(zero.out)
    assert module.config.null_condition.name == trained.config.null_condition.name == "empty"
    request = Request(["a red circle", "x"], [0, 1])
    changes = {"steps": 4, "guidance": 3.0, "truncation": 1.0}
    tokens = [m.sample_tokens(request, m.settings(changes)) for m in (module, trained)]
    assert torch.equal(*tokens)
    with pytest.raises(ValueError, match="of vq_diffusion, which paella cannot sample"):
        load_generator(plain.out, paper="paella")


def test_sample_takes_a_plain_model_as_an_improved_one(runs: Runs, tmp_path: Path) -> None:
    prompt = ["--prompt", "a red circle", "--seed", "3"]
    words = ["--ckpt", str(runs.plain.out), *prompt, "--device", "cpu"]
    for name, more in {
        "plain": [],
        "guided": ["--paper", "improved_vqd", "sampling.guidance=4"],
        "one": ["--paper", "improved_vqd", "sampling=plain", "sampling.steps=4"],
    }.items():
        assert command(sample.run, [*words, *more, "--out", str(tmp_path / name)]) == 0
    drawn = {p.name: (p / "00000.png").read_bytes() for p in tmp_path.iterdir()}
    assert drawn["guided"] != drawn["one"]
    wrong = [*words, "--paper", "muse", "--out", str(tmp_path / "x")]
    assert command(sample.run, wrong) == 2


def test_fine_tuning_depends_on_what_it_starts_from(runs: Runs, tmp_path: Path) -> None:
    plain = runs.plain
    start = f"init.ckpt={plain.out}"
    tuned = runs.go("tuned", "improved_vqd", start, "optim.lr=1e-9")
    assert FIRST & tuned.made() == {"train"}
    before, after = weights(plain), weights(tuned)
    assert after.keys() - before.keys() == {"null"}
    for key, value in before.items():
        if key.startswith("network."):
            torch.testing.assert_close(after[key], value, atol=1e-6, rtol=0)
    assert after["loss_count"].sum() > before["loss_count"].sum()  # it was trained all the same

    def train_key(*words: str) -> str:
        return next(s.key for s in stages("improved_vqd", *words) if s.name == "train")

    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((plain.out / "checkpoint.safetensors").read_bytes())
    assert train_key(f"init.ckpt={copy}") == train_key(start)  # what is in the file counts alone
    copy.write_bytes((tuned.out / "checkpoint.safetensors").read_bytes())
    assert len({train_key(f"init.ckpt={copy}"), train_key(start), train_key()}) == 3
    wrong = refused(lambda: load("improved_vqd", "micro", ["init.ckpt=nowhere"]))
    assert "init.ckpt: there is no file nowhere" in wrong


@pytest.mark.parametrize(("paper", "rows"), [("vq_diffusion", 10), ("improved_vqd", 11)])
def test_digits_by_their_class(runs: Runs, paper: str, rows: int) -> None:
    run = runs.go(f"digits-{paper}", paper, *CLASSES, f"model.class_number={rows}")
    prefixes = {"vq_diffusion": ["eval"], "improved_vqd": ["eval", "vq_diffusion"]}[paper]
    for prefix in prefixes:
        assert 0 <= run.scores[f"{prefix}/digit_accuracy"]["value"] <= 1
    module = load_generator(run.out)
    asked = [Request(["7"], [0]), Request([""], [0], labels=[7])]
    assert torch.equal(*(module.sample_tokens(request) for request in asked))
    assert module.text_encoder is None


def test_written_token_by_token(runs: Runs) -> None:
    """VQ-AR, the baseline of the same size, through the same stages."""
    run = runs.go("causal", "vq_diffusion", "model.causal=true")
    assert "eval/scene_accuracy" in run.scores
    assert weights(run).keys() == weights(runs.plain).keys()


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
    ("vq_diffusion", ["schedule.mask_rate=1.5"], r"schedule\.mask_rate must be from 0 to 1"),
]


@pytest.mark.parametrize(("paper", "words", "message"), WRONG, ids=lambda v: str(v)[:40])
def test_settings_that_do_not_fit(paper: str, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(paper, "micro", words)

"""Continuous latents through the stages: autoencoders alone, and LDMAE on top of one."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments.config import ConfigError, UserError, load
from experiments.pictures import load_png
from safetensors.torch import load_file

from data.tokens import TokenData
from data.webdata import WebData, prepare
from experiments import sample, stages
from experiments.store import Store
from lightning_modules.common.checkpoint import load_weights
from lightning_modules.registry import load_generator, load_tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:The dirpath has changed", "ignore:Your `IterableDataset`"
)
STAGES = {
    "ldmae": ["data", "autoencoder", "cache", "train", "sample", "score", "report"],
    "autoencoder": ["data", "autoencoder", "score", "report"],
}
LABELS = ["data=digits", "condition=label", "model.num_classes=10", "model.text_width=0"]


@dataclass
class Run:
    """A run that has ended."""

    paper: str
    words: list[str]
    out: Path
    cache: Path
    lines: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, Any]:
        return json.loads((self.out / "metrics.json").read_text())

    @cached_property
    def config(self) -> Any:
        return load(self.paper, "micro", self.words)

    def stage(self, name: str) -> Path:
        plan = {s.name: s for s in stages.plan(self.paper, self.config)}
        return Store(self.cache).folder(plan[name])

    def fate(self) -> dict[str, str]:
        heads = [line.partition("] ")[2].split() for line in self.lines if line.startswith("[")]
        return {h[0].rstrip(":"): h[1] for h in heads if h[1] in ("runs", "continues", "reused")}


def go(paper: str, out: Path, cache: Path, *words: str) -> Run:
    run = Run(paper, ["logger=csv", *words, f"cache={cache}"], out, cache)
    stages.run(paper, "micro", run.config, out, command=f"run {paper}", say=run.lines.append)
    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An autoencoder from an empty cache; the tests below build on its results."""
    root = tmp_path_factory.mktemp("alone")
    return go("autoencoder", root / "run", root / "cache")


@pytest.fixture(scope="module")
def first(alone: Run) -> Run:
    """An LDMAE on that autoencoder."""
    return go("ldmae", alone.out.parent / "ldmae", alone.cache)


def pictures(run: Run) -> WebData:
    data = run.config.data
    return WebData(data, prepare(data, run.stage("data")), batch_size=16)


def test_an_autoencoder_leaves_scores_page_and_checkpoint(alone: Run) -> None:
    names = ["autoencoder.safetensors", "config.yaml", "metrics.json", "report.html", "samples.png"]
    assert sorted(p.name for p in alone.out.iterdir()) == names
    assert alone.fate() == dict.fromkeys(STAGES["autoencoder"], "runs")
    scores = ["psnr", "ssim", "l1", "mse", "scene_accuracy", "rfd_scenes", "rfd_scenes/noise=0.1",
              "psnr/noise=0.3", "sigma2_object", "rho_object", "sigma2_part"]  # fmt: skip
    assert {f"eval/{name}" for name in scores} <= alone.metrics.keys()
    assert not any("codebook" in name for name in alone.metrics)
    page = (alone.out / "report.html").read_text()
    assert "rFD scenes against noise" in page and "Smoothness of the latents" in page


def test_statistics_are_those_of_sampled_latents_of_the_training_pictures(alone: Run) -> None:
    module = load_tokenizer(alone.out / "autoencoder.safetensors", paper="autoencoder")
    images = torch.stack([s["image"] for s in pictures(alone).samples("train")])
    moments = module.moments(images)
    mean, logvar = moments.chunk(2, dim=1)
    draws = mean + (0.5 * logvar).exp() * torch.randn(
        (50, *mean.shape), generator=torch.Generator().manual_seed(0)
    )
    draws = draws.transpose(0, 2).flatten(1)  # [C, ...]
    assert module.latent_std.min() > 0 and not torch.equal(module.latent_std, torch.ones(4))
    torch.testing.assert_close(module.latent_mean, draws.mean(1), atol=0.05, rtol=0.05)
    torch.testing.assert_close(module.latent_std, draws.std(1), atol=0.02, rtol=0.05)


@pytest.mark.parametrize("kind", ["ae", "sdvae"])
def test_the_other_kinds(alone: Run, tmp_path: Path, kind: str) -> None:
    run = go("autoencoder", tmp_path / "out", alone.cache, f"kind={kind}")
    assert run.fate()["data"] == "reused" and run.fate()["autoencoder"] == "runs"
    assert run.metrics["eval/psnr"]["value"] != alone.metrics["eval/psnr"]["value"]
    module = load_tokenizer(run.out / "autoencoder.safetensors")
    assert module.config.kind == kind


def test_ldmae_shares_the_autoencoder_and_caches_moments(alone: Run, first: Run) -> None:
    fate = {s: "reused" if s in STAGES["autoencoder"][:2] else "runs" for s in STAGES["ldmae"]}
    assert first.fate() == fate
    assert first.metrics["autoencoder/psnr"] == alone.metrics["eval/psnr"]
    assert {"eval/scene_accuracy", "eval/fd_scenes", "eval/heldout/scene_accuracy",
            "autoencoder/scene_accuracy"} <= first.metrics.keys()  # fmt: skip

    module = load_tokenizer(first.out / "autoencoder.safetensors")
    truth = {s["key"]: s["image"] for s in pictures(first).samples("train")}
    data = TokenData(first.stage("cache"), batch_size=64, epoch_batches=1)
    (batch,) = list(data.stream())
    assert batch["moments"].shape == (64, 8, 8, 8) and set(batch["key"]) == truth.keys()
    expected = module.moments(torch.stack([truth[key] for key in batch["key"]]))
    torch.testing.assert_close(batch["moments"], expected, atol=2e-3, rtol=2e-3)


def test_a_page_without_tokens(first: Run) -> None:
    page = (first.out / "report.html").read_text()
    assert "How a picture comes about from first to last step" in page
    assert "Tokens changed" not in page
    assert "Autoencoder: reconstructions of val" in page
    traces = json.loads((first.stage("sample") / "traces.json").read_text())
    assert [(t["steps"], t["changed"], t["tokens"]) for t in traces] == [(3, [], 0)] * 2


def test_many_steps_are_shown_by_few(first: Run, tmp_path: Path) -> None:
    run = go("ldmae", tmp_path / "out", first.cache, "sampling.steps=30")
    assert run.fate()["train"] == "reused" and run.fate()["sample"] == "runs"
    few, many = (load_png(r.stage("sample") / "trace-00000.png")[0].shape for r in (first, run))
    assert few[2] < many[2] < 2 * few[2]  # 3 pictures in a row, and 12 in three rows of 4
    assert 2 * few[1] < many[1] < 4 * few[1]


def test_the_checkpoint_draws_the_runs_own_pictures(
    first: Run, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prompt = json.loads((first.stage("sample") / "prompts.json").read_text())[3]
    words = ["--ckpt", str(first.out), "--prompt", prompt["prompt"], "--device", "cpu"]
    assert sample.main([*words, "--seed", str(prompt["seed"]), "--out", str(tmp_path / "x")]) == 0
    theirs = load_png(first.stage("sample") / prompt["file"])[0]
    assert torch.equal(load_png(tmp_path / "x" / "00000.png")[0], theirs)


def test_pictures_encoded_in_every_step(first: Run, tmp_path: Path) -> None:
    run = go("ldmae", tmp_path / "out", first.cache, "data.cache=false")
    assert list(run.fate()) == [s for s in STAGES["ldmae"] if s != "cache"]


def test_digits_by_their_labels(tmp_path: Path) -> None:
    run = go("ldmae", tmp_path / "out", tmp_path / "cache", *LABELS)
    assert run.metrics["eval/digit_accuracy"]["n"] == 16
    assert "eval/rfd_scenes" not in run.metrics
    module = load_generator(run.out / "checkpoint.safetensors")
    asked = json.loads((run.stage("sample") / "prompts.json").read_text())[0]
    settings = {"labels": [asked["label"]], "seeds": [asked["seed"]]}
    by_label = module.sample([""], **settings)
    theirs = load_png(run.stage("sample") / asked["file"])[0]
    made = (by_label[0] * 127.5 + 127.5).round().clamp(0, 255)
    assert (made - theirs.float()).abs().max() <= 1  # another batch rounds differently


def test_digits_have_smoothness_without_a_judge(tmp_path: Path) -> None:
    run = go("autoencoder", tmp_path / "out", tmp_path / "cache", "data=digits")
    assert {"eval/psnr", "eval/psnr/noise=0.2"} <= run.metrics.keys()
    assert not any("rfd" in name or "sigma2" in name for name in run.metrics)


# Files ----


def test_a_file_keeps_its_network_and_gets_the_statistics_of_these_pictures(
    alone: Run, tmp_path: Path
) -> None:
    path = alone.out / "autoencoder.safetensors"
    run = go("ldmae", tmp_path / "out", tmp_path / "cache", f"autoencoder.ckpt={path}", *LABELS)
    mine, theirs = load_file(run.out / "autoencoder.safetensors"), load_file(path)
    assert mine.keys() == theirs.keys()
    changed = {k for k in mine if not torch.equal(mine[k], theirs[k])}
    assert changed == {"latent_mean", "latent_std"}
    assert load_weights(run.out / "autoencoder.safetensors")[1]["kind"] == "vmae"


def test_tokenizers_and_autoencoders_are_not_mixed_up(alone: Run, tmp_path: Path) -> None:
    path = alone.out / "autoencoder.safetensors"
    with pytest.raises(UserError, match=r"a checkpoint of autoencoder, not a tokenizer"):
        go("paella", tmp_path / "a", alone.cache, f"tokenizer.ckpt={path}")
    shipped = stages.SHIPPED["tokenizer"] / "tiny.safetensors"
    with pytest.raises(UserError, match=r"a checkpoint of vqgan, not an autoencoder"):
        go("ldmae", tmp_path / "b", alone.cache, f"autoencoder.ckpt={shipped}")
    with pytest.raises(UserError, match=r"model.in_channels must be the autoencoder's 4 channels"):
        go("ldmae", tmp_path / "c", alone.cache, f"autoencoder.ckpt={path}", "model.in_channels=5")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.in_channels=5"], "model.in_channels must be the autoencoder's 4 channels, got 5"),
        (["model.input_size=4"], "model.input_size must be data.resolution / 4 = 8, got 4"),
        (["data.resolution=34"], "data.resolution must be a multiple of 4"),
        (["autoencoder.ckpt=a", "autoencoder.kind=ae"], "autoencoder.kind has no effect while"),
        (["autoencoder.preset=tin"], "autoencoder.preset: 'tin' is not one of"),
        (["autoencoder.trainer.accumulate=2"], "autoencoder.trainer.accumulate must be 1"),
        (["autoencoder.objective=al"], "did you mean all?"),
        (["tokenizer.ckpt=null"], "unknown setting 'tokenizer.ckpt'"),
    ],
)
def test_combinations_that_cannot_be(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load("ldmae", "micro", words)
    assert said in str(error.value)


def test_the_preset_fills_the_section() -> None:
    config: Any = load("ldmae", "micro", ["autoencoder.objective=l_r"])
    own: Any = load("autoencoder", "micro", ["objective=l_r"])
    for name in ("kind", "channels", "vit", "conv", "objective", "optim", "trainer"):
        assert getattr(config.autoencoder, name) == getattr(own, name)
    assert own.objective.disc_width == 8  # what the row of the ablation does not name is kept


def test_published_ldmae() -> None:
    config: Any = load("ldmae", "paper")
    assert (config.model.hidden_size, config.model.depth, config.model.num_classes) == (
        768, 12, 1000,
    )  # fmt: skip
    assert config.trainer.batch_size * config.trainer.devices == 1024
    assert (config.sampling.guidance, config.sampling.guidance_channels) == (10.0, 3)
    assert load("ldmae", "paper", ["sampling=paper"]).sampling.guidance_channels is None  # type: ignore[attr-defined]
    autoencoder: Any = load("autoencoder", "paper")
    assert autoencoder.trainer.batch_size * autoencoder.trainer.devices == 2048
    assert (autoencoder.objective.mask_ratio, autoencoder.objective.fixed_std) == (0.6, None)
    assert config.autoencoder.vit == autoencoder.vit


# Keys ----

TRAINED = {"train", "sample", "score", "report"}
CHANGES: list[tuple[str, str, set[str]]] = [
    ("ldmae", "sampling.guidance=3", {"sample", "score", "report"}),
    ("ldmae", "eval.bootstrap=30", {"score", "report"}),
    ("ldmae", "optim.lr=0.01", TRAINED),
    ("ldmae", "autoencoder.kind=vae", {"autoencoder", "cache", *TRAINED}),
    ("ldmae", "autoencoder.objective.noise=0.5", {"autoencoder", "cache", *TRAINED}),
    ("ldmae", "autoencoder.trainer.max_steps=4", {"autoencoder", "cache", *TRAINED}),
    ("ldmae", "data.seed=1", set(STAGES["ldmae"])),
    ("autoencoder", "kind=vae", {"autoencoder", "score", "report"}),
    ("autoencoder", "eval.prompts=8", {"score", "report"}),
]  # fmt: skip


def keys(paper: str, *words: str) -> dict[str, str]:
    return {s.name: s.key for s in stages.plan(paper, load(paper, "micro", words))}


@pytest.mark.parametrize(("paper", "word", "changed"), CHANGES)
def test_a_setting_changes_what_depends_on_it(paper: str, word: str, changed: set[str]) -> None:
    before, after = keys(paper), keys(paper, word)
    assert list(before) == STAGES[paper]
    assert {name for name in before if before[name] != after.get(name)} == changed

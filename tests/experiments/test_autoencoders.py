"""Continuous latents through the stages: autoencoders alone, and LDMAE on top of one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.scenes import scenes
from data.tokens import TokenData
from experiments import sample
from experiments.cli import command
from experiments.papers.base import ROOT
from experiments.papers.registry import load
from experiments.report.pictures import load_png
from experiments.settings import ConfigError, UserError
from lightning_modules.common.checkpoint import load_weights
from lightning_modules.common.request import Request
from lightning_modules.registry import load_first_stage, load_generator
from tests.micro_runs import QUIET, Run, changed, go, names

pytestmark = pytest.mark.filterwarnings(*QUIET)
FIRST = ["data-train", "data-val", "autoencoder", "statistics"]
LABELS = ["data=digits", "condition=label", "model.num_classes=10", "model.text_width=0"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An autoencoder from an empty cache; the tests below build on its results."""
    root = tmp_path_factory.mktemp("alone")
    return go("autoencoder", root / "run", root / "cache")


@pytest.fixture(scope="module")
def first(alone: Run) -> Run:
    """An LDMAE on that autoencoder."""
    return go("ldmae", alone.out.parent / "ldmae", alone.cache)


def pictures() -> dict[str, torch.Tensor]:
    """The training pictures [3, H, W] in [-1, 1] of scale micro, by key."""
    found = {s["key"]: torch.from_numpy(s["image"]) for s in scenes("train", 64, resolution=32)}
    return {key: image.permute(2, 0, 1).float() / 127.5 - 1 for key, image in found.items()}


def test_an_autoencoder_leaves_scores_page_and_checkpoint(alone: Run) -> None:
    files = [
        "autoencoder.safetensors",
        "config.yaml",
        "metrics.json",
        "report.html",
        "samples.png",
        "stages.json",
    ]
    assert sorted(p.name for p in alone.out.iterdir()) == files
    assert {*FIRST, "score"} <= alone.made()
    scores = [
        "psnr",
        "ssim",
        "l1",
        "mse",
        "scene_accuracy",
        "rfd_scenes",
        "rfd_scenes/noise=0.1",
        "psnr/noise=0.3",
        "sigma2_object",
        "rho_object",
        "sigma2_part",
    ]
    assert {f"eval/{name}" for name in scores} <= alone.scores.keys()
    assert not any("codebook" in name for name in alone.scores)
    assert "rFD scenes over noise" in alone.page and "Smoothness of the latents" in alone.page


def test_statistics_are_those_of_sampled_latents_of_the_training_pictures(alone: Run) -> None:
    module = load_first_stage(alone.out / "autoencoder.safetensors", paper="autoencoder")
    moments = module.moments(torch.stack([*pictures().values()]))
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
    assert run.made() == {"autoencoder", "statistics", "features-val", "score"}
    assert run.scores["eval/psnr"]["value"] != alone.scores["eval/psnr"]["value"]
    module = load_first_stage(run.out / "autoencoder.safetensors")
    assert module.config.kind == kind


def test_ldmae_shares_the_autoencoder_and_caches_moments(alone: Run, first: Run) -> None:
    assert not {*FIRST} & first.made() and {"encode", "train"} < first.made()
    assert first.scores["autoencoder/psnr"] == alone.scores["eval/psnr"]
    assert {
        "eval/scene_accuracy",
        "eval/fd_scenes",
        "eval/heldout/scene_accuracy",
        "autoencoder/scene_accuracy",
    } <= first.scores.keys()

    module = load_first_stage(first.out / "autoencoder.safetensors")
    truth = pictures()
    (batch,) = TokenData(first.folder("encode"), batch_size=64, epoch_batches=1).stream()
    assert batch["moments"].shape == (64, 8, 8, 8) and set(batch["key"]) == truth.keys()
    expected = module.moments(torch.stack([truth[key] for key in batch["key"]]))
    torch.testing.assert_close(batch["moments"], expected, atol=2e-3, rtol=2e-3)


def test_a_page_without_tokens(first: Run) -> None:
    assert "How a picture comes about from first to last step" in first.page
    assert "Tokens changed" not in first.page
    assert "Autoencoder: reconstructions of val" in first.page
    traces = json.loads((first.folder("sample-val") / "traces.json").read_text())
    assert [(t["steps"], t["changed"], t["tokens"]) for t in traces] == [(3, [], 0)] * 2


def test_many_steps_are_shown_by_few(first: Run, tmp_path: Path) -> None:
    run = go("ldmae", tmp_path / "out", first.cache, "sampling.steps=30")
    assert "train" not in run.made() and "sample-val" in run.made()
    trace = "trace-00000.png"
    few, many = (load_png(r.folder("sample-val") / trace)[0].shape for r in (first, run))
    assert few[2] < many[2] < 2 * few[2]  # 3 pictures in a row, and 12 in three rows of 4
    assert 2 * few[1] < many[1] < 4 * few[1]


@pytest.mark.bits
def test_the_checkpoint_draws_the_runs_own_pictures(first: Run, tmp_path: Path) -> None:
    asked = first.asked()
    (tmp_path / "prompts.txt").write_text("\n".join(row["prompt"] for row in asked))
    words = ["--ckpt", str(first.out), "--prompts", str(tmp_path / "prompts.txt"), "--seed", "0"]
    size = ["--batch-size", "16", "--device", "cpu"]
    assert command(sample.run, [*words, *size, "--out", str(tmp_path / "x")]) == 0
    made = [load_png(tmp_path / "x" / row["file"])[0] for row in asked]
    assert torch.equal(torch.stack(made), first.pictures())


def test_pictures_encoded_in_every_step(first: Run, tmp_path: Path) -> None:
    assert "encode" not in names("ldmae", "data.cache=false")
    assert go("ldmae", tmp_path / "out", first.cache, "data.cache=false").scores


def test_digits_by_their_labels(tmp_path: Path) -> None:
    run = go("ldmae", tmp_path / "out", tmp_path / "cache", *LABELS)
    assert run.scores["eval/digit_accuracy"]["n"] == 16
    assert "eval/rfd_scenes" not in run.scores
    module, asked = load_generator(run.out), run.asked()
    labels, seeds = ([row[name] for row in asked] for name in ("label", "seed"))
    by_label = module.sample(Request([""] * 16, seeds, labels=labels))
    made = (by_label * 127.5 + 127.5).round().clamp(0, 255)
    assert (made - run.pictures().float()).abs().max() <= 1


def test_digits_have_smoothness_without_a_classifier_of_scenes(tmp_path: Path) -> None:
    run = go("autoencoder", tmp_path / "out", tmp_path / "cache", "data=digits")
    assert {"eval/psnr", "eval/psnr/noise=0.2"} <= run.scores.keys()
    assert not any("rfd" in name or "sigma2" in name for name in run.scores)


# Files ----


def test_a_file_keeps_its_network_and_gets_the_statistics_of_these_pictures(
    alone: Run, tmp_path: Path
) -> None:
    path = alone.out / "autoencoder.safetensors"
    run = go("ldmae", tmp_path / "out", tmp_path / "cache", f"autoencoder.ckpt={path}", *LABELS)
    mine, theirs = load_file(run.out / "autoencoder.safetensors"), load_file(path)
    assert mine.keys() == theirs.keys()
    different = {k for k in mine if not torch.equal(mine[k], theirs[k])}
    assert different == {"latent_mean", "latent_std"}
    assert load_weights(run.out / "autoencoder.safetensors")[1]["kind"] == "vmae"


def test_a_training_starts_from_another_runs_weights(alone: Run, tmp_path: Path) -> None:
    path = alone.out / "autoencoder.safetensors"
    words = (f"start={path}", "optim.lr=1e-9", "trainer.max_steps=1")
    run = go("autoencoder", tmp_path / "out", alone.cache, *words)
    assert {"autoencoder", "score"} <= run.made()
    mine, theirs = load_file(run.out / "autoencoder.safetensors"), load_file(path)
    assert mine.keys() == theirs.keys()
    for key in mine.keys() - {"latent_mean", "latent_std"}:
        torch.testing.assert_close(mine[key], theirs[key], atol=1e-6, rtol=0)
    # the file counts by its content
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(path.read_bytes())
    assert not changed("autoencoder", f"start={copy}", *words[1:], given=words)
    with pytest.raises(ConfigError, match="start: there is no file nowhere"):
        names("autoencoder", "start=nowhere")


def test_tokenizers_and_autoencoders_are_not_mixed_up(alone: Run, tmp_path: Path) -> None:
    path = alone.out / "autoencoder.safetensors"
    with pytest.raises(UserError, match=r"a checkpoint of autoencoder, not a tokenizer"):
        go("paella", tmp_path / "a", alone.cache, f"tokenizer.ckpt={path}")
    shipped = ROOT / "lightning_modules" / "vqgan" / "shipped" / "tiny.safetensors"
    with pytest.raises(UserError, match=r"a checkpoint of vqgan, not an autoencoder"):
        go("ldmae", tmp_path / "b", alone.cache, f"autoencoder.ckpt={shipped}")
    with pytest.raises(UserError, match=r"model.in_channels must be the autoencoder's 4 channels"):
        go("ldmae", tmp_path / "c", alone.cache, f"autoencoder.ckpt={path}", "model.in_channels=5")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.in_channels=5"], "model.in_channels must be the autoencoder's 4 channels, got 5"),
        (["model.input_size=4"], "model.input_size must be the side of the latents 8x8, got 4"),
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
        768,
        12,
        1000,
    )
    assert config.trainer.batch_size * config.trainer.devices == 1024
    assert (config.sampling.guidance, config.sampling.guidance_channels) == (10.0, 3)
    assert load("ldmae", "paper", ["sampling=paper"]).sampling.guidance_channels is None  # type: ignore[attr-defined]
    autoencoder: Any = load("autoencoder", "paper")
    assert autoencoder.trainer.batch_size * autoencoder.trainer.devices == 2048
    assert (autoencoder.objective.mask_ratio, autoencoder.objective.fixed_std) == (0.6, None)
    assert config.autoencoder.vit == autoencoder.vit


# Keys ----

SPLITS = ("val", "heldout", "partial")
DRAWN = {f"{what}sample-{split}" for what in ("", "features-") for split in SPLITS}
TRAINED = {"train", "generator", "score", *DRAWN}
AUTOENCODER = {"autoencoder", "statistics", "features-val"}
CHANGES: list[tuple[str, str, set[str]]] = [
    ("ldmae", "sampling.guidance=3", {"score", *DRAWN}),
    ("ldmae", "eval.bootstrap=30", {"score"}),
    ("ldmae", "optim.lr=0.01", TRAINED),
    ("ldmae", "autoencoder.kind=vae", {"encode", *AUTOENCODER, *TRAINED}),
    ("ldmae", "autoencoder.objective.noise=0.5", {"encode", *AUTOENCODER, *TRAINED}),
    ("ldmae", "autoencoder.trainer.max_steps=4", {"encode", *AUTOENCODER, *TRAINED}),
    ("ldmae", "data.seed=1", set(names("ldmae"))),
    ("autoencoder", "kind=vae", {"score", *AUTOENCODER}),
    ("autoencoder", "eval.prompts=8", {"captions-val", "features-val", "score"}),
]


@pytest.mark.parametrize(("paper", "word", "made"), CHANGES)
def test_a_setting_changes_what_depends_on_it(paper: str, word: str, made: set[str]) -> None:
    assert changed(paper, word) == made

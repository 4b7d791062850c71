"""Official files of LDMAE in, an autoencoder and a generator that draws pictures out."""

import argparse
from pathlib import Path

import pytest
import torch

from experiments import sample
from experiments.cli import command
from experiments.convert import run
from experiments.report.pictures import load_png
from lightning_modules.ldmae.config import DiTConfig, ViTConfig
from lightning_modules.ldmae.network import DiT
from lightning_modules.ldmae.vmae import VMAE
from lightning_modules.registry import load_first_stage, load_generator

VIT = ViTConfig(32, 8, 24, 1, 12, 24, 1, 12)
DIT = DiTConfig(input_size=4, in_channels=3, hidden_size=24, depth=1, num_heads=2, num_classes=5)
VMAE_WORDS = ["--paper", "autoencoder", "--from", "vmae.pth", "--out", "v"]
DIT_WORDS = [
    "--paper",
    "ldmae",
    "--from",
    "0100000.pt",
    "--tokenizer",
    "vmae.pth",
    "--out",
    "d",
    "data.resolution=32",
    "sampling.steps=3",
]


def main(words: list[str]) -> int:
    """Run the command; returns the exit code."""
    return command(run, words)


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[VMAE, DiT]:
    """A folder with the two files and the statistics, as the released code writes them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    vmae, dit = VMAE(VIT, 3), DiT(DIT)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    extra = {"perceptual_loss.lin0.model.1.weight": torch.zeros(1)}
    model = {"model": vmae.state_dict() | extra, "epoch": 9, "args": argparse.Namespace(seed=0)}
    torch.save(model, "vmae.pth")
    old = {k: torch.zeros_like(v) for k, v in dit.state_dict().items()}
    torch.save({"model": old, "ema": dit.state_dict(), "opt": {}}, "0100000.pt")
    stats = {"mean": torch.full((1, 3, 1, 1), 0.5), "std": torch.full((1, 3, 1, 1), 2.0)}
    torch.save(stats, "latents_stats.pt")
    return vmae, dit


def test_an_autoencoder_with_its_statistics(
    official: tuple[VMAE, DiT], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*VMAE_WORDS, "--stats", "latents_stats.pt"]) == 0
    count = sum(p.numel() for p in official[0].parameters())
    said = capsys.readouterr().out
    assert f"vmae, {count:,} parameters, 3 channels, f8 -> v.safetensors" in said
    assert "not normalised" not in said
    images = torch.rand(1, 3, 32, 32)
    mean = official[0].moments(images)[:, :3]
    torch.testing.assert_close(load_first_stage("v.safetensors").encode(images), (mean - 0.5) / 2)
    assert main([*VMAE_WORDS[:-1], "w", "vit.num_heads=6"]) == 0
    assert "not normalised" in capsys.readouterr().out
    assert load_first_stage("w.safetensors").config.vit.num_heads == 6


def test_a_generator_with_its_autoencoder(official: tuple[VMAE, DiT]) -> None:
    assert main([*DIT_WORDS, "--stats", "latents_stats.pt"]) == 0
    module = load_generator("d.safetensors")
    for name, value in official[1].state_dict().items():  # the average
        assert torch.equal(module.state_dict()[f"network.{name}"], value), name
    assert module.grid == (4, 4) and module.config.condition == "label"
    assert torch.equal(module.first_stage.latent_std, torch.full((3,), 2.0))
    assert command(sample.run, ["--ckpt", "d.safetensors", "--prompt", "3", "--out", "a"]) == 0
    assert load_png("a/00000.png")[0].shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*VMAE_WORDS[:3], "0100000.pt", *VMAE_WORDS[4:]], "lacks patch_embed.proj.weight"),
        ([*VMAE_WORDS, "--stats", "none.pt"], "there is no file none.pt"),
        ([*VMAE_WORDS, "--tokenizer", "vmae.pth"], "--tokenizer goes with generators"),
        ([*VMAE_WORDS, "vit.depth=7"], "vit.depth is 1 in the file, not 7"),
        ([*DIT_WORDS[:3], "vmae.pth", *DIT_WORDS[4:]], "no diffusion model of LDMAE"),
        ([*DIT_WORDS[:-2], "data.resolution=64"], "model.input_size must be"),
        (["--paper", "vqgan", *VMAE_WORDS[2:], "--stats", "x"], "--stats goes with an autoenc"),
    ],
)
def test_wrong_words_are_one_line(
    official: tuple[VMAE, DiT],
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_resolution_follows_from_the_grid(official: tuple[VMAE, DiT]) -> None:
    assert main([w for w in DIT_WORDS if not w.startswith("data.resolution")]) == 0
    assert load_generator("d.safetensors").grid == (4, 4)


@pytest.mark.parametrize(
    ("std", "message"),
    [
        ([2, 2, 2], "real numbers"),
        ([2.0, 0.0, 2.0], "std of the latents must be positive"),
        ([2.0, float("nan"), 2.0], "std holds numbers that are not finite"),
    ],
)
def test_statistics_that_are_none(
    official: tuple[VMAE, DiT], std: list[float], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"mean": torch.zeros(3), "std": torch.tensor(std)}, "odd.pt")
    assert main([*VMAE_WORDS, "--stats", "odd.pt"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and not Path("v.safetensors").exists()


def test_statistics_are_given_once(
    official: tuple[VMAE, DiT], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(VMAE_WORDS) == 0
    again = ["--paper", "autoencoder", "--from", "v.safetensors", "--out", "w"]
    assert main([*again, "--stats", "latents_stats.pt"]) == 2
    assert "has statistics of its own" in capsys.readouterr().err
    assert main(again) == 0
    assert load_first_stage("w.safetensors").channels == 3


def test_latents_of_another_autoencoder_are_refused(
    official: tuple[VMAE, DiT], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": VMAE(VIT, 4).state_dict()}, "vmae.pth")
    assert main(DIT_WORDS) == 2
    assert "model.in_channels must be the autoencoder's 4 channels" in capsys.readouterr().err

"""Which samplings can be played step by step."""

from pathlib import Path

import pytest
import torch

from data.files import file_hash, write_json
from experiments.cli import command
from experiments.sample import run
from experiments.settings import ConfigError
from experiments.tracing import played
from lightning_modules.common.checkpoint import save_weights
from lightning_modules.common.request import Request
from lightning_modules.vqgan.module import VQGANModule
from tests.micro_checkpoint import TOKENIZER
from tests.tiny_generators import tiny


def test_pictures_by_windows_are_refused_before_one_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = VQGANModule({"model": TOKENIZER, "objective": {"disc_weight": 0.0}})
    save_weights("tokenizer.safetensors", *tokenizer.export())
    save_weights("checkpoint.safetensors", *tiny("muse").export())
    file = Path("tokenizer.safetensors")
    write_json("checkpoint.json", {"first_stage": {"file": file.name, "sha256": file_hash(file)}})
    side = 4 * tokenizer.factor
    words = ["--ckpt", ".", "--prompt", "a", "--out", "o", "--trace", "t.html", "sampling.steps=2"]
    assert command(run, [*words, "--size", f"{2 * side}x{side}"]) == 2
    error = capsys.readouterr().err
    assert f"a picture of {2 * side}x{side} pixels" in error and error.count("\n") == 1
    assert f"draw at most {side}x{side}" in error
    assert not Path("o").exists() and not Path("t.html").exists()


def test_a_sampling_without_a_step_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny("paella")
    monkeypatch.setattr(module, "sample", lambda *_: torch.zeros(1, 3, 8, 8))
    with pytest.raises(ConfigError, match="--trace has nothing to play: this sampling took no"):
        played(module, Request(["a"], [0]), [module.config.sampling])

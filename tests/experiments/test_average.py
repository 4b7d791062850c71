"""A series of weights that a training keeps, and the checkpoint that is their average."""

from pathlib import Path

import pytest
import torch

from experiments import average
from experiments.cli import command
from experiments.papers.registry import load
from experiments.pipeline.publish import Titles
from experiments.pipeline.runner import execute
from lightning_modules.common.checkpoint import load_weights, save_weights
from lightning_modules.common.request import Request
from lightning_modules.registry import load_generator


def test_a_run_keeps_a_series_whose_average_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["trainer.keep_every=1", "trainer.max_steps=6", "trainer.epoch_steps=2", "optim.ema=0"]
    config = load("paella", "micro", ["logger=csv", f"cache={tmp_path / 'cache'}", *words])
    ckpt = tmp_path / "run"
    execute(Titles("paella", "micro", "run"), config, ckpt, lambda line: None)
    series = sorted((tmp_path / "cache").glob("train-*/weights-*.safetensors"))
    assert [f.stem for f in series] == [f"weights-{n:08d}" for n in (2, 4, 6)]
    final = load_weights(ckpt / "checkpoint.safetensors")
    states = [load_weights(f)[0] for f in series]
    assert all(torch.equal(v, final[0][k]) for k, v in states[-1].items())
    out = tmp_path / "averaged" / "x.safetensors"
    words = ["--ckpt", str(ckpt), "--out", str(out), "--decay", "0.5", *map(str, series)]
    assert command(average.run, words) == 0 and "average of 3" in capsys.readouterr().out
    found, settings = load_weights(out)
    assert settings == final[1] and found.keys() == final[0].keys()
    moved = [k for k, v in found.items() if not torch.equal(v, final[0][k])]
    assert moved
    for k in moved:
        a, b, c = (s[k] for s in states)
        torch.testing.assert_close(found[k], a / 4 + b / 4 + c / 2)
    images = load_generator(out).sample(Request(["a red circle"], [0]))
    assert images.isfinite().all()

    alien = tmp_path / "alien.safetensors"
    save_weights(alien, states[0], {"paper": "muse"})
    for wrong, said in (
        ([*words, str(alien)], "holds weights of muse"),
        (words[:7], "at least two files"),
        ([*words, str(tmp_path / "none.safetensors")], "there is no checkpoint"),
        ([*words, "--decay", "2"], "decay must be"),
        ([*words, "--dekay", "2"], "unrecognized"),
    ):
        assert command(average.run, wrong) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1

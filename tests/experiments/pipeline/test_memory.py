"""What a run costs: no set of pictures in memory, no picture read or decoded twice in a stage."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import data.select
from experiments.papers.registry import load
from experiments.pipeline.encode import Encode
from experiments.pipeline.plan import plan
from experiments.pipeline.stage import Log
from experiments.pipeline.store import Store
from experiments.pipeline.train import Train
from lightning_modules.ldmae.autoencoder import AutoencoderModule
from lightning_modules.vqgan.module import VQGANModule
from tests.bench import memory


def test_memory_does_not_grow_with_the_prompts(tmp_path: Path) -> None:
    memory.prepare(tmp_path, 1000)
    few, many = (memory.peak(tmp_path, prompts) for prompts in (100, 1000))
    print(f"100 prompts: {few:.0f} MB, 1,000 prompts: {many:.0f} MB")
    assert many - few < 60


@pytest.mark.parametrize("paper", ["paella", "muse", "ldmae"])
def test_each_picture_is_decoded_once_per_stage(
    paper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of its file, and out of its tokens or latents."""
    counted: Counter[str] = Counter()
    decode_image = data.select.decode_image

    def files(*args: Any, **options: Any) -> Any:
        counted["files"] += 1
        return decode_image(*args, **options)

    monkeypatch.setattr(data.select, "decode_image", files)
    for cls in (VQGANModule, AutoencoderModule):
        monkeypatch.setattr(cls, "decode", counting(cls.decode, counted))

    run = load(paper, "micro", ["logger=csv", "eval.traces=0", f"cache={tmp_path}"])
    store, seen = Store(tmp_path), set()
    for stage in plan(paper, run).stages:
        counted.clear()
        store.run([stage], run.machine(), Log(lambda line: None, "none"))
        if isinstance(stage, Train):
            validation = 1 * 8  # trainer.val_batches of trainer.batch_size, kept for all epochs
            steps = 0 if isinstance(stage.source, Encode) else stage.loop.epochs * stage.loop.length
            assert counted["files"] <= steps * 8 + validation, stage.name
            continue
        files_of, decodes = EXPECTED[re.sub("-(val|heldout|partial)$", "", stage.name)]
        assert (counted["files"], counted["first stage"]) == (files_of, decodes), stage.name
        seen.add(stage.name)
    assert {"encode", "sample-val", "features-val", "features-reference"} <= seen


# stage -> pictures that are decoded out of files, and out of tokens or latents, at scale micro
EXPECTED = {
    "data-train": (0, 0), "data": (0, 0), "data-reference": (0, 0),
    "data-heldout_reference": (0, 0), "captions": (0, 0), "captions-reference": (0, 0),
    "captions-heldout_reference": (0, 0), "encode": (64, 0), "statistics": (64, 0),
    "generator": (0, 0), "sample": (0, 16), "sample-superres": (0, 16),
    "features-sample": (0, 0), "features-sample-superres": (0, 0),
    "features-reference": (32, 0), "features-heldout_reference": (32, 0), "features": (16, 16),
    "edits": (4, 8),  # before and after
    "features-edits": (0, 0), "score": (0, 0),
}  # fmt: skip


def counting(decode: Any, counted: Counter[str]) -> Any:
    def counts(self: Any, encoded: Any) -> Any:
        counted["first stage"] += len(encoded)
        return decode(self, encoded)

    return counts

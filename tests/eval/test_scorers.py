"""The registry of scores: each can be called alike, and each that it gives can be shown."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.scenes import scenes
from eval.edits import edit_tasks
from eval.extractors import (
    ClipRows,
    DigitRows,
    EditRows,
    FeatureRows,
    InceptionRows,
    ReconstructionRows,
    SceneRows,
)
from eval.rows import Extractor
from eval.scorers import METRICS, SCORERS
from tests.tiny_networks import clip_file, inception_file

SCENES = SceneRows.of(32, 2)
EXTRACTORS: dict[str, Extractor] = {
    "scenes": SCENES,
    "clip_scenes": SCENES,
    "digits": DigitRows(),
    "features": FeatureRows(),
    "reconstruction": ReconstructionRows(scenes=SCENES, levels=(0.0, 0.2), compress=True),
    "edits": EditRows(SCENES),
    **dict.fromkeys(("fid", "kid", "cmmd", "prdc", "giqa"), FeatureRows()),
}


@pytest.fixture(scope="module")
def extractors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All of the above, and those whose weights are no part of the project."""
    folder = tmp_path_factory.mktemp("networks")
    inception = InceptionRows(inception_file(folder), spatial=True, classes=True)
    model, file = clip_file(folder)
    return {
        **EXTRACTORS,
        **dict.fromkeys(("sfid", "inception_score"), inception),
        "clip_score": ClipRows(model, file),
        "preference": ClipRows(model, file, "pickscore"),
    }


class Same:
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images

    decode = encode


@pytest.mark.parametrize("name", SCORERS)
def test_every_score_can_be_shown(name: str, extractors: dict[str, Any]) -> None:
    samples = list(scenes("val", 12))
    images = torch.from_numpy(np.stack([s["image"] for s in samples])).permute(0, 3, 1, 2)
    asked: list[dict[str, Any]] = [{**s, "label": i % 10} for i, s in enumerate(samples)]
    if name == "edits":
        tasks = edit_tasks(samples, 12)
        asked = [{**t, "original": image} for t, image in zip(tasks, images, strict=True)]
    measure = extractors[name].load("cpu", folder=Path("unused"), first_stage=Same())
    made = measure(images, asked, 0)
    assert all(len(rows) == 12 for rows in made.rows.values())
    scores, verdicts = SCORERS[name](
        made, asked, made, prefix="eval", resamples=9, seed=0, pictures="drawn"
    )
    assert len(verdicts) == 12 and scores
    for full, score in scores.items():
        assert full.split("/")[1] in METRICS and score["pictures"] == "drawn"
        assert score["n"] >= 1 and "value" in score and {"low", "high"} <= score.keys()


def test_directions_are_in_words_that_the_pages_know() -> None:
    assert {m.better for m in METRICS.values()} == {"higher", "lower", ""}
    assert METRICS["fd_scenes"].better == "lower" and METRICS["psnr"].better == "higher"
    assert METRICS["fd_scenes_floor"].better == METRICS["clip_scenes_real"].better == ""

"""Scores of edits: a perfect edit, none at all, one that touches the rest; masks of the halves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.scene_drawing import Scene, draw_scene
from data.scenes import scenes
from eval.edits import edit_tasks, half_mask, score_edits
from eval.extractors import EditRows, SceneRows
from eval.rows import Measured

COUNT = 60


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Any]]:
    return list(scenes("val", COUNT, seed=3))


def pictures(shown: list[Scene], samples: list[dict[str, Any]]) -> Tensor:
    """Draw scenes with the things where the samples have them."""
    drawn = [
        draw_scene(scene, np.array([t["centre"] for t in s["attributes"]["things"]]) / 32)
        for scene, s in zip(shown, samples, strict=True)
    ]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)


def scored(images: Tensor, originals: Tensor, tasks: list[dict]) -> tuple[dict, list[dict]]:
    measure = EditRows(SceneRows.of(32, 2)).load("cpu", folder=Path("unused"))
    asked = [{**t, "original": o} for t, o in zip(tasks, originals, strict=True)]
    made = measure(images, asked, 0)
    return score_edits(made, tasks, None, prefix="edit", resamples=20, seed=0)


def test_tasks_ask_for_another_thing_in_one_place(samples: list[dict[str, Any]]) -> None:
    tasks = edit_tasks(samples, 40, seed=1)
    assert len(tasks) == 40 and edit_tasks(samples, 10, seed=1) == tasks[:10]
    assert edit_tasks(samples, 40, seed=2) != tasks
    for task in tasks:
        old, new = (
            x["things"] for x in (samples[task["sample"]]["attributes"], task["attributes"])
        )
        place = task["thing"]
        assert new[place]["color"] != old[place]["color"]
        assert new[place]["shape"] != old[place]["shape"]
        kept = {k: old[1 - place][k] for k in ("color", "shape", "size")}
        assert new[1 - place] == kept
        for thing in new:
            assert f"{thing['size']} {thing['color']} {thing['shape']}" in task["prompt"]
    assert {t["thing"] for t in tasks} == {0, 1}
    assert {t["attributes"]["layout"] for t in tasks} == {"row", "column"}


def test_the_mask_holds_the_changed_thing_alone(samples: list[dict[str, Any]]) -> None:
    for task in edit_tasks(samples, COUNT):
        mask = half_mask(task, 32, 32)
        assert int(mask.sum()) == 512
        for number, thing in enumerate(samples[task["sample"]]["attributes"]["things"]):
            x, y = thing["centre"]
            half = thing["half"]
            box = mask[int(y - half) : int(y + half) + 1, int(x - half) : int(x + half) + 1]
            assert bool(box.all()) == (number == task["thing"])
            assert bool(box.any()) == (number == task["thing"])


def test_scores_of_perfect_missing_and_careless_edits(samples: list[dict[str, Any]]) -> None:
    tasks = edit_tasks(samples, COUNT)
    chosen = [samples[t["sample"]] for t in tasks]
    before = pictures([Scene.from_attributes(s["attributes"]) for s in chosen], chosen)
    wanted = pictures([Scene.from_attributes(t["attributes"]) for t in tasks], chosen)
    perfect, verdicts = scored(wanted, before, tasks)
    assert perfect["edit/object_accuracy"]["value"] > 0.95
    assert perfect["edit/rest_accuracy"]["value"] > 0.95
    assert perfect["edit/rest_l1"]["value"] == 0
    assert sum(v["right"] for v in verdicts) > 0.9 * COUNT

    none, verdicts = scored(before, before, tasks)
    assert none["edit/object_accuracy"]["value"] == 0
    assert none["edit/rest_accuracy"]["value"] > 0.95
    assert {tuple(v["wrong"]) for v in verdicts} >= {("object",)}

    careless = wanted.flip(0)  # another picture's edit
    scores, _ = scored(careless, before, tasks)
    assert scores["edit/rest_accuracy"]["value"] < 0.2
    assert scores["edit/rest_l1"]["value"] > 0.05

    large = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in (wanted, before)]
    assert scored(*large, tasks)[0] == perfect  # larger pictures are reduced first


def test_rows_and_tasks_must_pair_up(samples: list[dict[str, Any]]) -> None:
    made, tasks = Measured({"labels": np.zeros((3, 8), np.int16)}), edit_tasks(samples, 2)
    with pytest.raises(ValueError, match="3 edited pictures and 2 tasks"):
        score_edits(made, tasks, None, prefix="edit", resamples=2, seed=0)

"""Scores of edits: a perfect edit, none at all, one that touches the rest; masks of the halves."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.scenes import Scene, draw_scene, scenes
from eval.edits import edit_tasks, half_mask, score_edits
from eval.judge import load_judge

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
    tasks, judge = edit_tasks(samples, COUNT), load_judge()
    chosen = [samples[t["sample"]] for t in tasks]
    before = pictures([Scene.from_attributes(s["attributes"]) for s in chosen], chosen)
    wanted = pictures([Scene.from_attributes(t["attributes"]) for t in tasks], chosen)
    perfect, verdicts = score_edits(wanted, before, tasks, judge=judge, resamples=20)
    assert perfect["edit/object_accuracy"]["value"] > 0.95
    assert perfect["edit/rest_accuracy"]["value"] > 0.95
    assert perfect["edit/rest_l1"]["value"] == 0
    assert sum(v["right"] for v in verdicts) > 0.9 * COUNT

    none, verdicts = score_edits(before, before, tasks, judge=judge, resamples=20)
    assert none["edit/object_accuracy"]["value"] == 0
    assert none["edit/rest_accuracy"]["value"] > 0.95
    assert {tuple(v["wrong"]) for v in verdicts} >= {("object",)}

    careless = wanted.flip(0)  # another picture's edit
    scores, _ = score_edits(careless, before, tasks, judge=judge, resamples=20)
    assert scores["edit/rest_accuracy"]["value"] < 0.2
    assert scores["edit/rest_l1"]["value"] > 0.05


def test_lists_must_belong_together(samples: list[dict[str, Any]]) -> None:
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="do not belong together"):
        score_edits(images, images, edit_tasks(samples, 2), judge=load_judge())

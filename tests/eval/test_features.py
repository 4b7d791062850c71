"""A perfect generator scores at the floor; with captions of the reference it would lie below."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data.scene_drawing import Scene, draw_scene, place
from data.scenes import scenes
from eval.extractors import FeatureRows
from eval.features import frechet_scores, score_features
from eval.rows import Measured

COUNT = 512


@pytest.fixture(scope="module")
def rows() -> dict[str, Measured]:
    """Features of val, of a perfect generator asked for it, and of scenes drawn by the same rules.

    The generator draws every scene that is asked, its things in fresh places.
    """
    measure = FeatureRows().load("cpu", folder=Path("unused"))
    val, others = (list(scenes("val", n, seed=s)) for n, s in ((COUNT, 0), (2 * COUNT, 77)))
    rng = np.random.default_rng(0)
    asked = [Scene.from_attributes(s["attributes"]) for s in val]
    drawn = {
        "val": [s["image"] for s in val],
        "generated": [draw_scene(scene, place(scene, rng)) for scene in asked],
        "reference": [s["image"] for s in others],
    }
    return {
        name: measure(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), [], 0)
        for name, images in drawn.items()
    }


def distances(made: Measured, reference: Measured) -> tuple[dict, dict]:
    scores = frechet_scores(made, reference, "eval", resamples=250, seed=0)
    return scores["eval/fd_scenes"], scores["eval/fd_scenes_floor"]


def test_a_perfect_generator_scores_at_the_floor(rows: dict[str, Measured]) -> None:
    fd, floor = distances(rows["generated"], rows["reference"])
    assert fd["n"] == floor["n"] == COUNT
    assert floor["low"] < fd["value"] < floor["high"]
    assert fd["low"] < floor["value"] < fd["high"]


def test_captions_shared_with_the_reference_put_it_below_the_floor(
    rows: dict[str, Measured],
) -> None:
    fd, floor = distances(rows["generated"], rows["val"])
    assert fd["value"] < floor["low"]


def test_both_distances_have_one_n(rows: dict[str, Measured]) -> None:
    few = Measured({"features": rows["val"].rows["features"][:40]}, models=rows["val"].models)
    fd, floor = distances(few, rows["reference"])
    assert fd["n"] == floor["n"] == 40 and "512 real pictures" in fd["reference"]
    fd, floor = distances(rows["reference"], few)
    assert fd["n"] == floor["n"] == 20
    # the distance falls with n: at 40 pictures the floor is far higher
    many = distances(rows["generated"], rows["reference"])[1]
    assert distances(few, rows["reference"])[1]["low"] > many["value"]


def test_unknown_pictures_have_a_distance_that_says_what_it_is() -> None:
    """Patterns of 96 px: coarse ones are nearer to one another than to fine ones."""
    rng = np.random.default_rng(3)
    smooth, rough = (
        torch.from_numpy(rng.integers(0, 256, (60, 3, side, side), np.uint8))
        .repeat_interleave(96 // side, 2)
        .repeat_interleave(96 // side, 3)
        for side in (4, 48)
    )
    measure = FeatureRows().load("cpu", folder=Path("unused"))
    real, same, other = (measure(x, [], 0) for x in (smooth[:40], smooth[40:], rough[:20]))
    options = {"prefix": "eval", "resamples": 50, "seed": 0, "pictures": "96 px"}
    near, verdicts = score_features(same, [], real, **options)
    far, _ = score_features(other, [], real, **options)
    assert list(near) == ["eval/fd_scenes", "eval/fd_scenes_floor"] and verdicts == [{}] * 20
    assert far["eval/fd_scenes"]["low"] > near["eval/fd_scenes"]["high"]
    assert "drawn scenes only" in near["eval/fd_scenes"]["about"]
    assert near["eval/fd_scenes"]["pictures"] == "96 px"
    assert score_features(same, [], None, **options)[0] == {}


def test_few_pictures_and_other_networks_are_refused() -> None:
    def made(count: int, model: str = "a") -> Measured:
        return Measured({"features": np.zeros((count, 3), np.float32)}, models={"features": model})

    for one, two in ((1, 4), (2, 3)):
        with pytest.raises(ValueError, match="at least 2 generated and 4 real pictures"):
            distances(made(one), made(two))
    with pytest.raises(ValueError, match="features of a and b do not compare"):
        distances(made(4), made(4, "b"))

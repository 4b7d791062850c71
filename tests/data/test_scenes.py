"""The embedded scenes: exact by seed, honest about what is held out and what captions leave out."""

import numpy as np
import pytest

from data.scene_captions import AskedScene, completions, parse
from data.scene_drawing import Scene, sample_scene
from data.scenes import IN_PART, REPEATS, SPLITS, is_heldout, scenes


def test_a_sample_depends_on_its_seed_split_and_number_alone():
    first, again = list(scenes("train", 5)), list(scenes("train", 9))
    for a, b in zip(first, again, strict=False):
        assert a["key"] == b["key"] and a["caption"] == b["caption"]
        assert np.array_equal(a["image"], b["image"]) and a["attributes"] == b["attributes"]
    other = list(scenes("train", 5, seed=1))
    assert any(a["caption"] != b["caption"] for a, b in zip(first, other, strict=True))
    samples = [s for split in SPLITS for s in scenes(split, 5)]
    assert len({s["key"] for s in samples}) == len({s["image"].tobytes() for s in samples}) == 30


def test_a_new_split_changes_no_other():
    """A split's number seeds its samples, and measured scores are of these samples."""
    assert [next(scenes(split, 1))["caption"] for split in SPLITS] == [
        "on a black background, a large cyan square to the left of a small green circle",
        "a large yellow triangle left of a large yellow circle on a white background",
        "a large yellow square to the left of a small purple circle on a white background",
        "on a black background, a large yellow triangle above a small cyan triangle",
        "a small red triangle above a large green square, white background",
        "on a black background, a blue triangle right of a large red circle.",
    ]


def test_heldout_combinations_are_a_tenth_and_never_in_train_or_val():
    for split in SPLITS:
        shown = [Scene.from_attributes(s["attributes"]) for s in scenes(split, 300)]
        assert {is_heldout(scene) for scene in shown} == {"heldout" in split}
    rng = np.random.default_rng(0)
    share = np.mean([is_heldout(sample_scene(rng)) for _ in range(5000)])
    assert share == pytest.approx(0.1, abs=0.02)


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="not 'test'"):
        next(scenes("test", 1))


def test_a_share_of_the_training_captions_is_in_part_and_all_others_are_whole():
    for split in SPLITS:
        samples = list(scenes(split, 600, max_objects=3))
        shown = [Scene.from_attributes(s["attributes"]) for s in samples]
        whole = [
            parse(s["caption"]) == AskedScene.of(scene)
            for s, scene in zip(samples, shown, strict=True)
        ]
        share = {"train": 1 - IN_PART, "partial": 0.0}.get(split, 1.0)
        assert np.mean(whole) == pytest.approx(share, abs=0.06 if split == "train" else 0)


def test_pictures_of_a_caption_in_part_show_it_and_differ_elsewhere():
    samples = list(scenes("partial", 50 * REPEATS, max_objects=3))
    varied = 0
    for first in range(0, len(samples), REPEATS):
        group = samples[first : first + REPEATS]
        assert len({s["caption"] for s in group}) == 1
        shown = {Scene.from_attributes(s["attributes"]) for s in group}
        assert shown <= set(completions(parse(group[0]["caption"]), 3))
        varied += len(shown) > 1
    assert varied > 45
    assert len({s["caption"] for s in samples}) > 45

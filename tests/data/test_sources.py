"""Splits: embedded data are written once, keys decide what is validation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.select import captions
from data.shards import write_shards
from data.sources import find_shards, holdout_share, write_embedded
from data.view import ShardList, View, is_held_out
from tests import planted

IMAGE = np.zeros((8, 8, 3), np.uint8)


def empty(path: Path, *names: str) -> Path:
    """Write a shard of empty members."""
    return planted.tar(path, dict.fromkeys(names, b""))


@pytest.fixture
def own(tmp_path: Path) -> str:
    samples = [{"key": f"{i:06d}", "image": IMAGE, "caption": str(i)} for i in range(130)]
    write_shards(samples, tmp_path / "own", 13)
    return str(tmp_path / "own")


def test_train_and_validation_share_the_keys(own: str) -> None:
    train, val = (find_shards(own, None, split) for split in ("train", "val"))
    assert train.paths == val.paths and train.holdout == val.holdout == pytest.approx(16 / 130)
    keys = [[s["key"] for s in captions(split, View(8))] for split in (train, val)]
    assert keys[1] and sorted(keys[0] + keys[1]) == [f"{i:06d}" for i in range(130)]
    assert all(train.holds(key) and not val.holds(key) for key in keys[0])
    short = replace(val, limit=3)
    assert [s["key"] for s in captions(short, View(8))] == keys[1][:3]


def test_own_validation_shards_hold_nothing_out(own: str, tmp_path: Path) -> None:
    write_shards([{"key": "v", "image": IMAGE, "caption": "v"}], tmp_path / "val", 1)
    train, val = (find_shards(own, str(tmp_path / "val"), s, 5) for s in ("train", "val"))
    assert len(train.paths) == 10 and train.holdout == val.holdout == 0
    assert [s["key"] for s in captions(val, View(8))] == ["v"] and val.limit == 5
    with pytest.raises(ValueError, match="shards have the splits train, val, not 'heldout'"):
        find_shards(own, None, "heldout")


def test_about_two_percent_are_held_out_and_more_of_small_sets(own: str, tmp_path: Path) -> None:
    held = sum(is_held_out(f"{i:09d}", 0.02) for i in range(20_000))
    assert 330 < held < 470
    large = empty(tmp_path / "0.tar", *[f"{i}.jpg" for i in range(900)])
    assert holdout_share([str(large)]) == 0.02
    assert holdout_share([str(empty(tmp_path / "1.tar", "a.jpg", "b.jpg"))]) == 0.5


@pytest.mark.parametrize("before", ["./", "train/", "v1.0/part/", "../up/"])
def test_a_folder_is_no_end_of_a_key(tmp_path: Path, before: str) -> None:
    names = [f"{before}{i:06d}.{suffix}" for i in range(160) for suffix in ("jpg", "txt")]
    shadows = [f"{before}._{i:06d}.jpg" for i in range(999)]
    assert holdout_share([str(empty(tmp_path / "0.tar", *names, *shadows))]) == pytest.approx(0.1)


def test_equal_keys_are_named(tmp_path: Path) -> None:
    for i in range(4):
        empty(tmp_path / f"{i}.tar", "image.jpg", "image.txt")
    with pytest.raises(ValueError, match=r"all 4 images .*0\.tar .* the key 'image'.*val_shards"):
        find_shards(str(tmp_path), None, "train")
    assert len(find_shards(str(tmp_path), str(tmp_path), "train").paths) == 4
    assert holdout_share([str(tmp_path / "0.tar")]) == 0.5  # a single image has no equal


def test_a_list_moves_with_its_folder(own: str, tmp_path: Path) -> None:
    below = ShardList((f"{tmp_path}/a/b/0.tar", f"{own}/00000.tar"), 0.1, True, 7)
    below.save(tmp_path / "a" / "shards.json")
    (tmp_path / "a").rename(tmp_path / "moved")
    loaded = ShardList.load(tmp_path / "moved" / "shards.json")
    assert loaded == replace(below, paths=(f"{tmp_path}/moved/b/0.tar", f"{own}/00000.tar"))


def test_scenes_are_written_whatever_an_interruption_left(tmp_path: Path) -> None:
    def write(seed: int = 0) -> ShardList:
        folder = tmp_path / str(seed)
        return write_embedded(folder, "scenes", "heldout_reference", 300, seed, 16, 3)

    made = write()
    assert [Path(p).name for p in made.paths] == ["00000.tar", "00001.tar"]
    before = [Path(p).read_bytes() for p in made.paths]
    for damaged in (Path(made.paths[1]), tmp_path / "0" / "shards.json"):
        damaged.write_bytes(b"")
        assert write() == made and [Path(p).read_bytes() for p in made.paths] == before
    assert Path(write(1).paths[0]).read_bytes() != before[0]
    shown = [s["attributes"] for s in captions(made, View(16))]
    assert len(shown) == 300 and max(len(s["things"]) for s in shown) == 3
    for name, split in (("scenes", "test"), ("digits", "heldout"), ("letters", "train")):
        with pytest.raises(ValueError, match=f"not '{split if name != 'letters' else name}'"):
            write_embedded(tmp_path / "none", name, split, 1, 0, 16, 2)

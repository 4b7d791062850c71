"""Captions and pictures of a split agree, in any part of it, and nothing is decoded in vain."""

import json
from pathlib import Path

import numpy as np
import pytest

import data.select
from data.select import captions, pictures
from data.shards import SkipCounter, write_shards
from data.sources import find_shards
from data.view import ShardList, View
from tests import planted

CORRUPT = 11


@pytest.fixture
def made() -> list[dict]:
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 12, 3)).astype(np.uint8)
    return [
        {"key": f"{i:06d}", "image": image, "caption": f"number {i}", "label": i}
        for i, image in enumerate(images)
    ]


@pytest.fixture
def shards(made: list[dict], tmp_path: Path) -> ShardList:
    """40 samples in 4 shards."""
    return ShardList(tuple(write_shards(made, tmp_path, 10)))


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was decoded so far."""
    seen: list[bytes] = []
    decode = data.select.decode_image

    def counting(encoded: bytes, *args, **options) -> np.ndarray:
        seen.append(encoded)
        return decode(encoded, *args, **options)

    monkeypatch.setattr(data.select, "decode_image", counting)
    return seen


def test_captions_decode_nothing(shards: ShardList, decodes: list[bytes]) -> None:
    found = list(captions(shards, View(8)))
    assert (
        found == [{"key": f"{i:06d}", "caption": f"number {i}", "label": i} for i in range(40)]
        and decodes == []
    )
    assert list(captions(shards, View(8), first=33, limit=5)) == found[33:38]
    assert list(captions(shards, View(8), first=38, limit=5)) == found[38:]
    assert (
        list(captions(shards, View(8), limit=0)) == list(captions(shards, View(8), first=99)) == []
    )


@pytest.mark.parametrize("crop", ["center", "random"])
def test_pictures_are_cut_in_the_centre_and_never_mirrored(made, shards, crop) -> None:
    found = list(pictures(shards, View(8, crop=crop, flip=True)))
    for sample, source in zip(found, made, strict=True):
        np.testing.assert_array_equal(sample.pop("pixels"), source["image"][:, 2:10])
    assert found == list(captions(shards, View(8)))


def test_parts_decode_only_what_they_hold(shards: ShardList, decodes: list[bytes]) -> None:
    stream = pictures(shards, View(8), first=13)
    assert next(stream)["label"] == 13 and len(decodes) == 1
    decodes.clear()
    parts = [list(pictures(shards, View(8), first=n, limit=7)) for n in range(0, 40, 7)]
    assert [s["label"] for part in parts for s in part] == list(range(40))
    assert len(decodes) == len(set(decodes)) == 40


def test_a_corrupt_picture_leaves_a_gap(made: list[dict], tmp_path: Path) -> None:
    for i, part in enumerate((made[:CORRUPT], made[CORRUPT:])):
        write_shards(part, tmp_path / str(i), 40)
    junk = {"broken.png": b"junk", "broken.txt": b"junk"}
    planted.tar(tmp_path / "0" / "00000.tar", junk, "a")
    shards = ShardList(tuple(f"{tmp_path}/{i}/00000.tar" for i in range(2)))
    names = [s["key"] for s in captions(shards, View(8))]
    assert len(names) == 41 and names[CORRUPT] == "broken"
    parts = [[s["key"] for s in pictures(shards, View(8), first=n, limit=9)] for n in (0, 9, 18)]
    assert parts == [names[:9], [*names[9:11], *names[12:18]], names[18:27]]
    with pytest.raises(
        ValueError, match=r"1 of 41 samples were skipped: 1 corrupt image.*broken in"
    ):
        list(pictures(shards, View(8), max_skipped=0.0))


def test_metadata_filters(tmp_path: Path, decodes: list[bytes]) -> None:
    image = planted.encoded(size=(8, 8), suffix=".png")
    metas = {
        "good": '{"AESTHETIC_SCORE": 6, "pwatermark": 0.1, "punsafe": 0.1}',
        "alias": '{"aesthetic_score_laion_v2": 6, "pwatermark": 0.1, "punsafe": 0.1}',
        "ugly": '{"aesthetic": 4, "pwatermark": 0.1, "punsafe": 0.1}',
        "marked": '{"aesthetic": 6, "pwatermark": 0.9, "punsafe": 0.1}',
        "unsafe": '{"aesthetic": 6, "pwatermark": 0.1, "punsafe": 0.9}',
        "unknown": '{"aesthetic": null}',
        "small": '{"aesthetic": 6, "original_width": 9, "original_height": 3}',
    }
    members: dict[str, bytes] = {}
    for key, meta in metas.items():
        members |= {f"{key}.png": image, f"{key}.txt": b"x", f"{key}.json": meta.encode()}
    planted.tar(tmp_path / "0.tar", members)
    shards = find_shards(str(tmp_path), str(tmp_path), "val")

    def kept(**filters) -> list[str]:
        return [s["key"] for s in captions(shards, View(8, **filters))]

    assert kept() == list(metas)
    assert kept(min_aesthetic=5.0) == ["good", "alias", "marked", "unsafe", "small"]
    assert kept(max_pwatermark=0.5) == ["good", "alias", "ugly", "unsafe"]
    assert kept(max_punsafe=0.5) == ["good", "alias", "ugly", "marked"]
    assert kept(min_size=8) == [key for key in metas if key != "small"] and decodes == []
    with pytest.raises(
        ValueError, match=r"0\.tar ... hold no sample to use \(7 filtered: min_size"
    ):
        kept(min_size=9_000)


def test_captions_by_their_length_and_in_default(tmp_path: Path) -> None:
    metas = {
        "several": {"caption": ["a", "a cat", "a cat on a very long mat"]},
        "alias": {"TEXT": "a dog"},
        "long": {"caption": "a dog on a very long mat"},
        "none": {"caption": [" ", None]},
        "empty": {},
    }
    members: dict[str, bytes] = {}
    for key, meta in metas.items():
        members |= {f"{key}.png": b"junk", f"{key}.json": json.dumps(meta).encode()}
    planted.tar(tmp_path / "0.tar", members)
    shards = ShardList((str(tmp_path / "0.tar"),))

    def told(seed: int = 0, **settings) -> tuple[dict[str, str], dict[str, int]]:
        skips = SkipCounter(0.9)
        found = list(captions(shards, View(8, seed=seed, **settings), skips=skips))
        return {row["key"]: row["caption"] for row in found}, dict(skips.counts)

    found, counts = told(min_caption=2, max_caption=9)
    assert found == {"several": "a cat", "alias": "a dog"}
    assert counts == {"seen": 5, "no caption": 2, "filtered: max_caption": 1}
    assert told(min_caption=9)[1]["filtered: min_caption"] == 1
    assert told(caption="a thing")[0]["none"] == told(caption="a thing")[0]["empty"] == "a thing"
    drawn = [told(seed)[0]["several"] for seed in range(20)]
    assert set(drawn) == set(metas["several"]["caption"]) and drawn[0] == told()[0]["several"]

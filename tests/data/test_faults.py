"""Shards full of planted faults: every good sample is seen, every fault counted under its kind."""

import io
import os
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.images import BOMB, CORRUPT, TRUNCATED
from data.order import Cursor, Slot
from data.readers import LINK, UNSAFE_NAME
from data.select import pictures
from data.shards import GONE, LOST, PICKLE
from data.skips import SkipCounter
from data.view import Order, ShardList, View
from data.webdata import WebData
from tests import planted


class Creates:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def jpeg(seed: int = 0, **options) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def pair(key: str, image: bytes, text: bytes = b"a picture", suffix: str = "jpg") -> list:
    return [(f"{key}.{suffix}", image), (f"{key}.txt", text)]


@pytest.fixture
def faulty(tmp_path: Path) -> tuple[ShardList, list[str], dict[str, int]]:
    """Uneven shards, the keys of their good samples, and how often each fault is in them."""
    good = jpeg()
    a = [m for i in range(9) for m in pair(f"a{i}", jpeg(i))]
    a += pair("cut", good[: len(good) // 2]) + pair("junk", b"no image at all")
    a += [("nocaption.jpg", good), *pair("empty", good, b" \n"), ("noimage.txt", b"text")]
    a += pair("bomb", planted.with_header(60_000), suffix="png")
    b = [*pair("../../out", good), *pair("/tmp/out", good)]
    b += [("link.jpg", "/etc/passwd"), ("link.txt", b"a link")]
    b += [*pair("kept", good), ("kept.pkl", pickle.dumps(Creates(tmp_path / "unpickled")))]
    c = pair("a0", jpeg(100)) + pair("a1", jpeg(101))  # keys of the first shard
    d = [m for i in range(4) for m in pair(f"d{i}", jpeg(i))]
    shards = zip("abcd", (a, b, c, d), strict=True)
    paths = [str(planted.tar(tmp_path / f"{name}.tar", m)) for name, m in shards]
    with tarfile.open(paths[3]) as tar:
        cut = tar.getmember("d2.jpg").offset + 100  # within a header
    Path(paths[3]).write_bytes(Path(paths[3]).read_bytes()[:cut])
    keys = [*(f"a{i}" for i in range(9)), "kept", "a0", "a1", "d0", "d1"]
    counts = {TRUNCATED: 1, CORRUPT: 1, "no caption": 2, "no image": 1, BOMB: 1, UNSAFE_NAME: 2}
    counts |= {LINK: 1, PICKLE: 1}
    return ShardList((*paths, str(tmp_path / "gone.tar"))), keys, counts


def test_a_pass_in_order_keeps_what_is_good_and_counts_the_rest(faulty, monkeypatch) -> None:
    shards, keys, counts = faulty
    counters: list[SkipCounter] = []
    monkeypatch.setattr(
        "data.select.SkipCounter", lambda *a: counters.append(SkipCounter(*a)) or counters[-1]
    )
    assert [s["key"] for s in pictures(shards, View(8), max_skipped=0.95)] == keys
    found = counters[0].counts
    assert {kind: found[kind] for kind in counts} == counts
    assert found[LOST] >= 1 and found[GONE] >= 1
    assert set(found) == {"seen", LOST, GONE, *counts}
    assert found["seen"] == len(keys) + sum(found.values()) - found["seen"] - found[PICKLE]
    folder = Path(shards.paths[0]).parent
    assert sorted(p.name for p in folder.iterdir()) == ["a.tar", "b.tar", "c.tar", "d.tar"]


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_every_pass_of_the_stream_has_every_good_sample_once(faulty, slots: int) -> None:
    """With more places in a batch than there are shards, and fewer."""
    shards, keys, counts = faulty
    web = WebData(shards, None, View(8), Order(0, 8), batch_size=slots, max_skipped=0.95)
    source, order = web.source(), web.order()
    seen: dict[int, Counter] = {0: Counter(), 1: Counter(), 2: Counter()}
    shown = source.show

    def noting(row, visit):
        made = shown(row, visit)
        return made and (visit, row["key"])

    source.show = noting  # type: ignore[method-assign]
    for slot in range(slots):
        for (visit, key), _ in Slot(order, source, slot, Cursor()):
            if visit > 2:
                break
            seen[visit][key] += 1
    assert seen == {visit: Counter(keys) for visit in range(3)}
    assert set(source.skips.counts) == {"seen", LOST, GONE, *counts}
    assert not (Path(shards.paths[0]).parent / "unpickled").exists()


def test_more_workers_than_shards_all_have_work(faulty) -> None:
    shards, keys, counts = faulty
    web = WebData(
        shards, None, View(8), Order(6, 8), batch_size=8, epoch_batches=8, max_skipped=0.95
    )
    seen = Counter(key for batch in web.stream() for key in batch["key"])
    assert set(seen) == set(keys) and sum(seen.values()) == 64
    assert {kind for kind in counts if kind in web.skipped} == set(counts)

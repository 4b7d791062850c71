"""The digits and the photographs that scikit-learn ships go through the DataModule."""

import io
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from data import photos
from data.digits import NAMES, digit_caption, digits
from data.select import captions, pictures
from data.sources import find_shards, write_embedded
from data.view import Order, View
from data.webdata import WebData


def test_digits_split_once_and_for_all() -> None:
    train, val = list(digits("train")), list(digits("val"))
    assert (len(train), len(val)) == (1498, 299)
    assert not {s["key"] for s in train} & {s["key"] for s in val}
    assert set(Counter(s["label"] for s in val)) == set(range(10))
    again = next(iter(digits("val")))
    assert again["caption"] == val[0]["caption"]
    np.testing.assert_array_equal(again["image"], val[0]["image"])
    with pytest.raises(ValueError, match="not 'heldout'"):
        next(digits("heldout"))


def test_captions_name_the_digit() -> None:
    assert digit_caption(3) == "a handwritten three"
    samples = list(digits("val"))
    assert all(NAMES[s["label"]] in s["caption"] for s in samples)
    assert len({s["caption"].replace(NAMES[s["label"]], "") for s in samples}) == 4


def test_digits_are_those_of_scikit_learn() -> None:
    source = load_digits()
    sample = next(digits("train", resolution=8))
    expected = np.rint(source.images[0] * 255 / 16)
    np.testing.assert_array_equal(sample["image"], np.stack([expected] * 3, axis=-1))
    assert sample["label"] == source.target[0]
    assert next(digits("train"))["image"].shape == (32, 32, 3)


def test_a_classifier_reads_enlarged_digits() -> None:
    train, val = (
        (np.stack([s["image"][::4, ::4, 0].ravel() for s in part]), [s["label"] for s in part])
        for part in (list(digits("train")), list(digits("val")))
    )
    assert KNeighborsClassifier(3).fit(*train).score(*val) > 0.95


def test_digits_go_through_the_data_module(tmp_path: Path) -> None:
    train, val = (
        write_embedded(tmp_path / split, "digits", split, size, 0, 32, 2)
        for split, size in (("train", 5_000), ("val", 50))
    )
    data = WebData(train, val, View(32), Order(), batch_size=8, epoch_batches=2)
    for batch in data.stream():
        assert batch["image"].shape == (8, 3, 32, 32)
        for caption, label in zip(batch["caption"], batch["label"].tolist(), strict=True):
            assert NAMES[label] in caption
    assert [len(list(captions(split, View(32)))) for split in (train, val)] == [1498, 50]


def test_photographs_become_jpeg_shards(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["photos", "--out", str(tmp_path / "own")])
    photos.main()
    assert "wrote 2 shards" in capsys.readouterr().out
    with tarfile.open(tmp_path / "own" / "00000.tar") as tar:
        member = tar.extractfile("000000000.jpg")
        assert member is not None
        assert Image.open(io.BytesIO(member.read())).format == "JPEG"
    train, val = (
        find_shards(f"{tmp_path}/own/{{00000..00001}}.tar", None, s) for s in ("train", "val")
    )
    data = WebData(train, val, View(64), Order(), batch_size=16, epoch_batches=2)
    batches = list(data.stream())
    assert [batch["image"].shape for batch in batches] == [(16, 3, 64, 64)] * 2
    assert all("patch of a" in caption for caption in batches[0]["caption"])
    assert 4 <= len(list(pictures(val, View(64)))) <= 40
    samples = list(photos.photos())
    assert len({s["key"] for s in samples}) == len(samples) == 456
    assert samples[0]["caption"] == "a patch of a temple in china, top left"

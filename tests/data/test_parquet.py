"""Parquet files as Hugging Face's datasets writes them."""

import io
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from data.parquet import count_parquet, parquet_keys, read_parquet
from tests import planted


def write(path: Path, **columns: Any) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    return str(path)


@pytest.mark.parametrize("struct", [True, False])
def test_samples(tmp_path: Path, struct: bool) -> None:
    planted.parquet(tmp_path, struct)
    url = str(tmp_path / "data" / "train-00001-of-00002.parquet")
    found = list(read_parquet(url))
    assert len(found) == count_parquet(url) == 20
    assert [s["__key__"] for s in found] == list(parquet_keys(url))
    assert found[3]["__key__"] == "train-00001-of-00002/000003"
    assert json.loads(found[3]["json"]) == {
        "text": "train 1 3",
        "label": 1,
        "caption": ["train 1 3"],
    }
    assert found[3]["png" if struct else "jpg"] == planted.encoded(103, suffix=".png")


def test_a_remote_file_is_read_alike(tmp_path: Path) -> None:
    planted.parquet(tmp_path)
    path = tmp_path / "data" / "train-00001-of-00002.parquet"
    fsspec.filesystem("memory").pipe("/hub/train-00001-of-00002.parquet", path.read_bytes())
    url = "memory://hub/train-00001-of-00002.parquet"
    there = [{**sample, "__url__": ""} for sample in read_parquet(url)]
    assert there == [{**sample, "__url__": ""} for sample in read_parquet(str(path))]
    assert count_parquet(url) == 20 and list(parquet_keys(url)) == [s["__key__"] for s in there]


def test_reading_begins_anywhere(tmp_path: Path) -> None:
    url = write(tmp_path / "a.parquet", image=[b"x"] * 100, caption=[str(i) for i in range(100)])
    for first in (0, 1, 6, 7, 8, 63, 64, 65, 99, 100, 200):
        found = [json.loads(s["json"])["caption"] for s in read_parquet(url, first)]
        assert found == [[str(i)] for i in range(first, 100)]


def test_what_datasets_pushes_is_read(tmp_path: Path) -> None:
    """The file is written by the library whose conventions these are."""
    import datasets

    features = datasets.Features(
        picture=datasets.Image(),
        kind=datasets.ClassLabel(names=["a_cat", "dog"]),
        aesthetic=datasets.Value("float32"),
    )
    images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(4)]
    rows = {"picture": images, "kind": [0, 1, 0, 1], "aesthetic": [1.0, 2.0, 3.0, None]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")
    found = list(read_parquet(str(tmp_path / "train.parquet")))
    told = [json.loads(sample["json"]) for sample in found]
    assert [(t["label"], t["caption"]) for t in told[:2]] == [(0, ["a cat"]), (1, ["dog"])]
    assert [t.get("aesthetic") for t in told] == [1.0, 2.0, 3.0, None]
    (data,) = (
        value for value in found[2].values() if isinstance(value, bytes) and value[:1] != b"{"
    )
    assert Image.open(io.BytesIO(data)).getpixel((0, 0)) == (2, 0, 0)


@pytest.mark.parametrize(
    ("texts", "captions"),
    [
        ({"caption": ["one"]}, ["one"]),
        ({"text": ["one\n two "]}, ["one two"]),
        ({"captions": [["one", "", "two"]]}, ["one", "two"]),
        ({"sentences": [[{"raw": "one", "id": 3}, {"raw": "two", "id": 4}]]}, ["one", "two"]),
        ({"caption": [""], "text": ["one"]}, ["one"]),
        ({"other": ["one"]}, []),
    ],
)
def test_names_of_captions(tmp_path: Path, texts: dict, captions: list) -> None:
    url = write(tmp_path / "a.parquet", image=[b"x"], **texts)
    (sample,) = read_parquet(url)
    assert json.loads(sample["json"])["caption"] == captions


def test_keys(tmp_path: Path) -> None:
    url = write(tmp_path / "a.parquet", image=[b"x"] * 3, image_id=[7, None, 9], text=["a"] * 3)
    assert [s["__key__"] for s in read_parquet(url)] == ["7", "a/000001", "9"]
    assert list(parquet_keys(url)) == ["7", "a/000001", "9"]


def test_a_picture_in_a_file_beside(tmp_path: Path) -> None:
    planted.picture(tmp_path / "root" / "in.png")
    planted.picture(tmp_path / "out.png")
    paths = ["in.png", "../out.png", str(tmp_path / "out.png"), "none.png", None]
    column = [{"bytes": None, "path": path} for path in paths]
    url = write(tmp_path / "root" / "a.parquet", image=column, text=["a"] * 5)
    found = list(read_parquet(url))
    assert found[0]["png"] == (tmp_path / "root" / "in.png").read_bytes()
    assert all(set(sample) == {"json", "__key__", "__url__"} for sample in found[1:])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    url = write(tmp_path / "a.parquet", url=["x"], text=["a"])
    with pytest.raises(
        ValueError, match=r"a\.parquet has no column of pictures .* it has url, text"
    ):
        list(read_parquet(url))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 junk PAR1")
    with pytest.raises(pyarrow.ArrowException):
        list(read_parquet(str(tmp_path / "b.parquet")))
    assert count_parquet(str(tmp_path / "b.parquet")) == 0
    assert not list(parquet_keys(str(tmp_path / "b.parquet")))
    assert count_parquet(str(tmp_path / "none.parquet")) == 0

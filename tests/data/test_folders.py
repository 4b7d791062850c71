"""Folders of pictures: classes, faces, and tables of captions beside them."""

import os
from collections import Counter
from pathlib import Path

import pytest

from data import folders
from data.corpora import rows as corpus_rows
from tests import planted


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("place", ["", "ILSVRC/Data/CLS-LOC"])
def test_labels_of_imagenet_follow_the_sorted_ids(tmp_path: Path, flat: bool, place: str) -> None:
    planted.imagenet(tmp_path / place, flat)
    faults: Counter[str] = Counter()
    rows, official = corpus_rows("imagenet", tmp_path, "train", faults)
    assert official and not faults and len(rows) == 24
    assert {(r.label, *r.captions) for r in rows} == {
        (0, "tench"),
        (1, "goldfish"),
        (2, "great white shark"),
    }
    val, _ = corpus_rows("imagenet", tmp_path, "val", faults)
    assert len(val) == 12 and all((tmp_path / r.base / r.file).is_file() for r in [*rows, *val])
    for row in val:  # the fourth to the eighth picture are those of the second class, and so on
        assert row.label == (int(row.key[-8:]) - 1) // 4
    index = folders.imagenet_index(tmp_path)
    assert all(path.exists() for path in index) and len(index) == (6 if flat else 8)
    assert any(path.name == "LOC_val_solution.csv" for path in index) == flat


def test_names_of_classes_may_come_with_the_data(tmp_path: Path) -> None:
    planted.imagenet(tmp_path)
    lines = [f"{wnid} name {i}, other name" for i, wnid in enumerate(planted.WNIDS[:2])]
    (tmp_path / "LOC_synset_mapping.txt").write_text("\n".join(lines))
    rows, _ = corpus_rows("imagenet", tmp_path, "val", Counter())
    assert {row.captions[0] for row in rows} == {"name 0", "name 1", planted.WNIDS[2]}


def test_what_imagenet_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the train split of ImageNet is missing: there is no"):
        folders.imagenet_index(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="has no folder that is named by a WordNet id"):
        folders.imagenet_index(tmp_path)
    planted.imagenet(tmp_path, flat=True)
    (tmp_path / "LOC_val_solution.csv").unlink()
    with pytest.raises(ValueError, match=r"nor, in .*, LOC_val_solution\.csv of Kaggle"):
        folders.imagenet_index(tmp_path)
    planted.picture(tmp_path / "val" / "n09999999" / "a.JPEG")
    with pytest.raises(ValueError, match=r"has the class n09999999, which .*train has not"):
        corpus_rows("imagenet", tmp_path, "val", Counter())


def test_the_last_faces_of_ffhq_are_validation(tmp_path: Path) -> None:
    planted.faces(tmp_path)
    train, official = corpus_rows("ffhq", tmp_path, "train", Counter())
    val, _ = corpus_rows("ffhq", tmp_path, "val", Counter())
    assert official and [row.key for row in train] == [f"59000/{n}" for n in range(59990, 60000)]
    assert [row.key for row in val] == [f"60000/{n}" for n in range(60000, 60010)]
    assert not any(row.captions or row.label is not None for row in [*train, *val])
    everything, official = corpus_rows("celebahq", tmp_path, "val", Counter())
    assert len(everything) == 20 and not official  # keys decide


def test_a_part_of_ffhq_is_split_by_key(tmp_path: Path) -> None:
    planted.faces(tmp_path, range(20))
    everything, official = corpus_rows("ffhq", tmp_path, "train", Counter())
    assert len(everything) == 20 and not official


def test_classes_of_an_imagefolder(tmp_path: Path) -> None:
    planted.imagefolder(tmp_path)
    rows, official = corpus_rows("imagefolder", tmp_path, "train", Counter())
    assert official and len(rows) == 16
    assert {(r.label, *r.captions) for r in rows} == {(0, "cat"), (1, "tabby dog")}
    assert rows[0].key == "train/cat/000" and rows[0].file == "train/cat/000.png"


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for i, name in enumerate(["train", "car", "train", "car"]):
        planted.picture(tmp_path / name / f"{i}.png")
    rows, official = corpus_rows("imagefolder", tmp_path, "train", Counter())
    assert not official and {(r.label, *r.captions) for r in rows} == {(0, "car"), (1, "train")}


def test_faces_in_several_sizes_are_refused(tmp_path: Path) -> None:
    for folder in ("images1024x1024", "thumbnails128x128"):
        planted.faces(tmp_path / folder)
    with pytest.raises(ValueError, match="more than once, as images1024x1024/59000/59990"):
        corpus_rows("ffhq", tmp_path, "train", Counter())
    assert len(corpus_rows("ffhq", tmp_path / "images1024x1024", "val", Counter())[0]) == 10


@pytest.mark.parametrize("table", ["csv", "jsonl"])
def test_metadata_say_captions_and_labels(tmp_path: Path, table: str) -> None:
    planted.imagefolder(tmp_path, table)
    planted.picture(tmp_path / "train" / "alone.png")
    faults: Counter[str] = Counter()
    val, official = corpus_rows("imagefolder", tmp_path, "val", faults)
    assert official and faults == {"a picture of which the metadata say nothing": 1}
    assert [(r.file, *r.captions, r.label) for r in val[:2]] == [
        ("validation/000.png", "a validation picture, 0", 0),
        ("validation/001.png", "a validation picture, 1", 1),
    ]


def test_a_table_in_the_folder_of_a_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for i in range(2):
            planted.picture(tmp_path / split / f"{i}.png")
        lines = ["file_name,caption,label", "0.png,zero,one", '1.png,"two\nlines",other']
        (tmp_path / split / "metadata.csv").write_text("\n".join(lines))
    val, official = corpus_rows("imagefolder", tmp_path, "val", Counter())
    assert official and [(r.file, r.captions, r.label) for r in val] == [
        ("test/0.png", ("zero",), 0),
        ("test/1.png", ("two lines",), 1),
    ]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("metadata.csv", "path,text\na.png,b\n", "has no column file_name: it has path, text"),
        ("metadata.csv", "", "holds no rows"),
        ("metadata.jsonl", "{", "cannot be read"),
        ("metadata.jsonl", "3", "holds no rows"),
        ("metadata.parquet", "PAR", "cannot be read"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, text: str, says: str
) -> None:
    planted.picture(tmp_path / "a.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as caught:
        corpus_rows("imagefolder", tmp_path, "train", Counter())
    assert says in str(caught.value) and "\n" not in str(caught.value) and name in str(caught.value)


def test_links_to_folders_are_counted_not_followed(tmp_path: Path) -> None:
    planted.picture(tmp_path / "away" / "b.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "away")
    with pytest.raises(ValueError, match=r"lies below .*; links to folders are not followed"):
        folders.index(tmp_path / "root")
    planted.picture(tmp_path / "root" / "a.png")
    faults: Counter[str] = Counter()
    rows, _ = corpus_rows("imagefolder", tmp_path / "root", "train", faults)
    assert [row.file for row in rows] == ["a.png"] and list(faults.values()) == [1]


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted.picture(tmp_path / "a.png")
    planted.picture(tmp_path / "closed" / "b.png")
    scandir = os.scandir

    def refuse(path: str | Path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        list(folders.pictures(tmp_path))


def test_hidden_files_are_no_pictures(tmp_path: Path) -> None:
    planted.picture(tmp_path / "a.PNG")
    planted.picture(tmp_path / "._a.png")
    planted.picture(tmp_path / ".thumbnails" / "a.png")
    assert list(folders.pictures(tmp_path)) == ["a.PNG"]
    os.remove(tmp_path / "a.PNG")
    with pytest.raises(ValueError, match=r"no picture .* lies below"):
        folders.index(tmp_path)

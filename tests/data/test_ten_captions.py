"""CUB-200 and Oxford-102: ten captions in text files, splits of several origins."""

import pickle
from collections import Counter
from pathlib import Path

import pytest
from scipy.io import savemat

from data.corpora import index, rows
from data.ten_captions import pickled_texts
from tests import planted

UNLISTED = {"a picture that images.txt does not list": 1}


@pytest.mark.parametrize(("split", "train"), [("classes", 16), ("pictures", 18), ("pickles", 20)])
def test_birds(tmp_path: Path, split: str, train: int) -> None:
    planted.birds(tmp_path, split)
    faults: Counter[str] = Counter()
    found, official = rows("cub200", tmp_path, "train", faults)
    val, _ = rows("cub200", tmp_path, "val", Counter())
    assert official and faults == UNLISTED and (len(found), len(val)) == (train, 24 - train)
    if split == "classes":
        assert {row.label for row in found} == {0, 1} and {row.label for row in val} == {2}
        assert found[0].key == "001.Black_footed_Albatross/Black_footed_Albatross_0000_00"
    row = found[0]
    assert (tmp_path / row.base / row.file).is_file() and len(row.captions) == 10
    assert row.captions[3].endswith("said in way 3 .")
    assert all(path.exists() for path in index("cub200", str(tmp_path)))


def test_classes_win_over_pictures(tmp_path: Path) -> None:
    planted.birds(tmp_path, "pictures")
    before = len(rows("cub200", tmp_path, "train", Counter())[0])
    planted.birds(tmp_path, "classes")
    assert (before, len(rows("cub200", tmp_path, "train", Counter())[0])) == (18, 16)


def test_flowers(tmp_path: Path) -> None:
    planted.flowers(tmp_path)
    found, official = rows("oxford102", tmp_path, "train", Counter())
    val, _ = rows("oxford102", tmp_path, "val", Counter())
    assert official and (len(found), len(val)) == (16, 8)
    assert {row.label for row in found} == {0, 1} and {row.label for row in val} == {2}
    assert found[0].key == "image_00001" and found[0].captions[9] == "flower 1 said in way 9"


def test_flowers_split_as_they_came(tmp_path: Path) -> None:
    planted.flowers(tmp_path)
    for name in ("trainvalclasses.txt", "testclasses.txt"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"oxford102 says nowhere .* nor setid\.mat"):
        index("oxford102", str(tmp_path))
    splits = {"trnid": [[1, 2, 3]], "valid": [[4, 5]], "tstid": [list(range(6, 25))]}
    savemat(tmp_path / "setid.mat", splits)
    savemat(tmp_path / "imagelabels.mat", {"labels": [[i % 5 + 1 for i in range(24)]]})
    found, _ = rows("oxford102", tmp_path, "train", Counter())
    val, _ = rows("oxford102", tmp_path, "val", Counter())
    assert [row.label for row in found] == [0, 1, 2] and [row.label for row in val] == [3, 4]
    (tmp_path / "setid.mat").write_text("MATLAB")
    with pytest.raises(ValueError, match=r"setid\.mat is no MATLAB file"):
        index("oxford102", str(tmp_path))


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        ("CUB_200_2011", r"the pictures of cub200 is missing|cub200 says nowhere|no images"),
        ("text_c10", "the captions of cub200 is missing: there is no text_c10 or text/text"),
        ("trainvalclasses.txt", "cub200 says nowhere which pictures are for training"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, gone: str, says: str) -> None:
    planted.birds(tmp_path)
    (tmp_path / gone).rename(tmp_path / "aside")
    with pytest.raises(ValueError, match=says):
        index("cub200", str(tmp_path))


def test_a_picture_without_captions_stays_to_be_counted(tmp_path: Path) -> None:
    planted.birds(tmp_path)
    next((tmp_path / "text_c10").rglob("*.txt")).unlink()
    splits = (rows("cub200", tmp_path, split, Counter())[0] for split in ("train", "val"))
    found = [row for split in splits for row in split]
    assert sorted(len(row.captions) for row in found) == [0] + [10] * 23


class Bomb:
    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_is_never_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "filenames.pickle"
    for protocol in range(5):
        path.write_bytes(pickle.dumps(["a/b", "c", Bomb()], protocol))
        assert {"a/b", "c"} <= set(pickled_texts(path))
    assert "executed" not in capsys.readouterr().out
    path.write_bytes(b"\x80\x04junk")
    with pytest.raises(ValueError, match="is no list of names"):
        pickled_texts(path)

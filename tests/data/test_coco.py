"""MS-COCO from its own folders: one row per picture, all captions, never a mix of versions."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from data import coco
from tests import planted


@pytest.mark.parametrize("year", [2014, 2017])
def test_a_row_per_picture_with_all_its_captions(tmp_path: Path, year: int) -> None:
    planted.coco(tmp_path, year, train=3, val=2)
    faults: Counter[str] = Counter()
    rows = list(coco.rows(tmp_path, year, faults))
    assert not faults and [row.split for row in rows] == ["train"] * 3 + ["val"] * 2
    first = rows[0]
    assert first.key == ("COCO_train2014_000000000001" if year == 2014 else "000000000001")
    assert (first.base, first.file) == (f"train{year}", f"{first.key}.jpg")
    assert (tmp_path / first.base / first.file).is_file()
    assert sorted(first.captions) == [f"picture 1 said in way {i}" for i in range(5)]
    assert first.meta == {"original_width": 24, "original_height": 20, "image_id": 1}


@pytest.mark.parametrize("places", ["images/{}", "{0}/{0}"])
def test_pictures_may_lie_a_level_deeper(tmp_path: Path, places: str) -> None:
    planted.coco(tmp_path, train=2, val=2)
    for name in ("train2014", "val2014"):
        (tmp_path / name).rename(tmp_path / "aside")
        (tmp_path / places.format(name)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "aside").rename(tmp_path / places.format(name))
    (tmp_path / "annotations" / "captions_val2014.json").rename(tmp_path / "captions_val2014.json")
    rows = list(coco.rows(tmp_path, 2014, Counter()))
    assert all((tmp_path / row.base / row.file).is_file() for row in rows) and len(rows) == 4
    assert len(coco.index(tmp_path, 2014)) == 4


def refusal(root: Path, year: int = 2014) -> str:
    with pytest.raises(ValueError) as caught:
        coco.index(root, year)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    planted.coco(tmp_path, train=2, val=2)
    captions = tmp_path / "annotations" / "captions_val2014.json"
    for path, says in (
        (
            captions,
            "the val split of coco2014 is missing: there is no annotations/captions_val2014",
        ),
        (
            tmp_path / "train2014",
            "the pictures of the train split are missing: no folder train2014",
        ),
    ):
        path.rename(tmp_path / "aside")
        assert refusal(tmp_path).startswith(says)
        (tmp_path / "aside").rename(path)
    captions.write_text("<html>not found</html>")
    assert "is no JSON of COCO" in refusal(tmp_path)


def test_versions_are_never_mixed(tmp_path: Path) -> None:
    planted.coco(tmp_path / "old", 2014, 2, 2)
    planted.coco(tmp_path / "new", 2017, 2, 2)
    assert "captions_train2017.json is there, which is another version: data=coco2017" in refusal(
        tmp_path / "new", 2014
    )
    for made, year in (("new", 2014), ("old", 2017)):  # renamed by hand
        root = tmp_path / f"as{year}"
        shutil.copytree(tmp_path / made, root)
        for path in [*root.iterdir(), *(root / "annotations").iterdir()]:
            path.rename(path.with_name(re.sub("20(14|17)", str(year), path.name)))
        assert f"holds COCO {2014 + 2017 - year}, not {year}: take data=coco" in refusal(root, year)
        for path in (root / "annotations").iterdir():  # the version stands behind the captions
            content = json.loads(path.read_text())
            path.write_text(json.dumps({"licenses": "-" * 2**17, **content, "info": 0}))
        if year == 2017:
            assert coco.index(root, year)
            with pytest.raises(ValueError, match="holds COCO 2014, not 2017"):
                list(coco.rows(root, year, Counter()))


def test_entries_that_say_nothing_are_counted(tmp_path: Path) -> None:
    planted.coco(tmp_path, train=3, val=2)
    path = tmp_path / "annotations" / "captions_train2014.json"
    content = json.loads(path.read_text())
    content["images"] += [{"id": 7}, {"id": 1, "file_name": "again.jpg"}, None, {"id": "1"}]
    content["annotations"] += [{"image_id": 99, "caption": "of none"}, {"image_id": 1}, 3]
    content["annotations"] += [{"image_id": 1, "caption": " \n "}]
    path.write_text("\ufeff" + json.dumps(content))
    faults: Counter[str] = Counter()
    rows = [row for row in coco.rows(tmp_path, 2014, faults) if row.split == "train"]
    assert len(rows) == 3 and all(len(row.captions) == 5 for row in rows)
    assert sorted(faults.values()) == [1, 3, 3] and all(path.name in fault for fault in faults)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"images": [', "is no whole JSON"),
        ("{}", "lacks the lists images and annotations"),
        ('{"images": [], "annotations": []}', "holds no picture with a caption"),
        ('{"images": {}, "annotations": 3}', "lacks the lists"),
        ("[" * 100_000, "is no whole JSON"),
    ],
)
def test_a_broken_json_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "captions_val2014.json"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        coco.read_captions(path)
    assert says in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)

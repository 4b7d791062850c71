"""Listings: rows of pictures where they lie, read as a tar of them would be."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.listing import (
    MISSING,
    OUTSIDE,
    Row,
    count_listing,
    inside,
    listing_keys,
    read_lines,
    read_listing,
    read_rows,
    write_listings,
)
from tests import planted

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def test_a_folder_of_the_layout_may_be_a_link(tmp_path: Path) -> None:
    planted.picture(tmp_path / "disk" / "a.png")
    planted.picture(tmp_path / "b.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "train").symlink_to(tmp_path / "disk")
    rows = [Row(name, f"{name}.png", base="train") for name in ("a", "../b")]
    url = listing(tmp_path, tmp_path / "root", *rows)
    assert {s["__key__"]: s.get("__fault__") for s in read_listing(url)} == {
        "a": None,
        "../b": OUTSIDE,
    }


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(TEXT, st.lists(TEXT, max_size=3), st.none() | st.integers(0, 9)),
        unique_by=lambda row: row[0],
        min_size=1,
        max_size=9,
    )
)
def test_rows_come_back_whatever_they_say(tmp_path_factory, told: list) -> None:
    folder = tmp_path_factory.mktemp("listing")
    rows = [Row(key, f"{key}.jpg", tuple(texts), "", label) for key, texts, label in told]
    paths = write_listings(rows, folder, folder, per_listing=4)
    assert len(paths) == -(-len(rows) // 4)
    found = [pair for path in paths for pair in read_rows(path)]
    assert sorted(row.key for _, row in found) == sorted(row.key for row in rows)
    assert {row.key: row for _, row in found} == {row.key: row for row in rows}
    assert {root for root, _ in found} == {str(folder)}
    assert write_listings(reversed(rows), folder, folder, 4) == paths  # the order is the keys'
    assert [pair for path in paths for pair in read_rows(path)] == found


def listing(folder: Path, root: Path, *rows: Row) -> str:
    (path,) = write_listings(rows, root, folder)
    return path


def test_samples_are_those_of_a_tar(tmp_path: Path) -> None:
    picture = planted.picture(tmp_path / "root" / "a" / "b.JPEG")
    row = Row("a/b", "a/b.JPEG", ("one", "two"), "", 3, {"original_width": 24})
    url = listing(tmp_path, tmp_path / "root", row)
    (sample,) = read_listing(url)
    assert sample.pop("jpeg") == picture.read_bytes()
    meta = json.loads(sample.pop("json"))
    assert meta == {"original_width": 24, "caption": ["one", "two"], "label": 3}
    assert sample == {"__key__": "a/b", "__url__": str(picture)}
    assert count_listing(url) == 1 and list(listing_keys(url)) == ["a/b"]


def test_reading_begins_anywhere(tmp_path: Path) -> None:
    rows = [Row(f"{i}", f"{i}.png", (str(i),)) for i in range(5)]
    url = listing(tmp_path, tmp_path, *rows)
    keys = list(listing_keys(url))
    for first in range(7):
        assert [s["__key__"] for s in read_listing(url, first)] == keys[first:]


@pytest.mark.parametrize("name", ["../b.png", "a/../../b.png", "/etc/a.png", "out.png", "up/b.png"])
def test_no_path_leaves_the_root(tmp_path: Path, name: str) -> None:
    planted.picture(tmp_path / "b.png")
    root = tmp_path / "root"
    planted.picture(root / "in.png")
    (root / "out.png").symlink_to(tmp_path / "b.png")
    (root / "up").symlink_to(tmp_path)
    assert inside(str(root), name) is None
    (sample,) = read_listing(listing(tmp_path, root, Row("k", name, ("c",))))
    assert sample["__fault__"] == OUTSIDE and sample["png"] is None


def test_links_that_stay_inside_are_followed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    planted.picture(root / "in.png")
    (root / "link.png").symlink_to("in.png")
    (tmp_path / "alias").symlink_to(root)
    for base in (root, tmp_path / "alias"):
        (sample,) = read_listing(listing(tmp_path, base, Row("k", "link.png", ("c",))))
        assert sample["png"] == (root / "in.png").read_bytes() and "__fault__" not in sample


def test_a_missing_file_is_a_fault_of_its_own(tmp_path: Path) -> None:
    planted.picture(tmp_path / "0.png")
    rows = [Row(str(i), f"{i}.png", ("c",)) for i in range(2)]
    os.mkdir(tmp_path / "2.png")
    rows.append(Row("2", "2.png", ("c",)))
    faults = {
        s["__key__"]: s.get("__fault__") for s in read_listing(listing(tmp_path, tmp_path, *rows))
    }
    assert faults == {"0": None, "1": MISSING, "2": "unreadable file"}


def test_names_that_are_no_text(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.png")
    planted.picture(tmp_path / odd)
    names = [odd, "a\0b.png", "\ud800.png"]
    rows = [Row(os.path.splitext(name)[0], name, ("c",)) for name in names]
    found = {s["__key__"]: s for s in read_listing(listing(tmp_path, tmp_path, *rows))}
    assert all(key.encode() for key in found) and len(found) == 3
    assert all(sample["__url__"].encode() for sample in found.values())
    faults = [found[row.key].get("__fault__") for row in rows]
    assert faults == [None, MISSING, MISSING]


@pytest.mark.parametrize("text", ["", "3\n", '{"root": "/"}\n{"key": 1}\n', '{"root": "/"}\n{'])
def test_another_file_is_no_listing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "0.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no listing of pictures"):
        list(read_listing(str(path)))
    assert count_listing(str(path)) == 0 and not list(listing_keys(str(path)))


def test_lines_of_texts_in_old_encodings(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for data in ("é  one\n\n two \n".encode(), "é one\r\ntwo".encode("latin-1")):
        path.write_bytes(data)
        assert read_lines(path) == ["é one", "two"]
    path.write_bytes(b"a\0b")
    with pytest.raises(ValueError, match=r"a\.txt is no text"):
        read_lines(path)

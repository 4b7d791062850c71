"""Lists of prompts: drawn from COCO, read from files, and what is wrong with others."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.pipeline.prompts import (
    ClassList,
    CocoCaptions,
    NoPrompts,
    PromptFile,
    clean,
    list_hash,
    remarks,
)
from tests import planted


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = planted.coco(tmp_path_factory.mktemp("coco"), train=1, val=40)
    return root / "annotations" / "captions_val2014.json"


def test_a_drawn_list_has_every_picture_once_and_one_of_its_captions(captions: Path) -> None:
    rows = CocoCaptions(captions).rows(None)
    assert Counter(row["number"] for row in rows) == Counter(range(5001, 5041))
    for row in rows:
        assert row["id"] == str(row["number"]) and row["file"] == f"{row['number']:012d}.png"
        way = int(row["prompt"].rpartition(" ")[2])
        assert row["prompt"] == f"picture {row['number']} said in way {way}" and way in range(5)
    assert len({row["prompt"][-1] for row in rows}) > 1  # not always the first caption
    assert [row["number"] for row in rows] != sorted(row["number"] for row in rows)


def test_the_order_is_that_of_a_hash(captions: Path) -> None:
    """Written down, so that no version of anything draws another list."""
    numbers = [row["number"] for row in CocoCaptions(captions, seed=3).rows(5)]
    ranked = sorted(range(5001, 5041), key=lambda n: hashlib.sha256(f"3/{n}".encode()).digest())
    assert numbers == ranked[:5]


def test_a_shorter_list_is_the_beginning_of_a_longer_one(captions: Path) -> None:
    whole = CocoCaptions(captions).rows(40)
    assert CocoCaptions(captions).rows(10) == whole[:10]
    assert CocoCaptions(captions, seed=1).rows(10) != whole[:10]
    with pytest.raises(ValueError, match="captions of 40 pictures, fewer than the 41"):
        CocoCaptions(captions).rows(41)


def test_what_the_json_lacks_is_counted(captions: Path, tmp_path: Path) -> None:
    content = json.loads(captions.read_text())
    content["images"] = content["images"][1:]  # its captions are of no picture
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 5040]
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps(content))
    assert {row["number"] for row in CocoCaptions(path).rows(None)} == {*range(5002, 5040)}
    with pytest.raises(ValueError, match="5 x an annotation without caption or image"):
        CocoCaptions(path).rows(40)


CSV = 'image_id,text\n42,"a cat, grey"\n7, a dog \n'
FILES = {
    "list.csv": CSV,
    "list.tsv": CSV.replace("42,", "42\t").replace("7,", "7\t").replace("id,", "id\t"),
    "list.json": '[{"image_id": 42, "caption": "a cat, grey"}, {"id": 7, "prompt": "a dog"}]',
    "ids.json": '{"42": "a cat, grey", "7": "a dog"}',
    "list.jsonl": '{"id": 42, "text": "a cat, grey"}\n\n{"id": 7, "text": "a dog"}\n',
}


@pytest.mark.parametrize("name", FILES)
def test_lists_with_ids(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("\ufeff" + FILES[name])
    rows = PromptFile(path).rows(None)
    assert [(r["id"], r["number"], r["prompt"]) for r in rows] == [
        ("42", 42, "a cat, grey"),
        ("7", 7, "a dog"),
    ]
    assert [r["file"] for r in rows] == ["000000000042.png", "000000000007.png"]
    assert PromptFile(path).rows(1) == rows[:1]


def test_lists_without_ids_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a cat\n\n a dog \n")
    (tmp_path / "list.json").write_text('["a cat", "a dog\\n"]')
    found = [PromptFile(tmp_path / name).rows(None) for name in ("list.txt", "list.json")]
    assert found[0] == found[1] and [row["id"] for row in found[0]] == ["0", "1"]
    assert list_hash(found[0]) == hashlib.sha256(b"0\ta cat\n1\ta dog\n").hexdigest()


def test_ids_that_are_no_names_of_files(tmp_path: Path) -> None:
    names = ["../../etc/passwd", "a/b", ".hidden", "", "ok-1.x", "x" * 300, "a\tb"]
    (tmp_path / "list.json").write_text(json.dumps({name: "a cat" for name in names}))
    files = [row["file"] for row in PromptFile(tmp_path / "list.json").rows(None)]
    assert len({*files}) == len(names) and "ok-1.x.png" in files
    assert all(Path(file).name == file and len(file) < 120 for file in files)
    assert not any(file.startswith(".") for file in files)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("list.csv", "id,text\n1,a\n1,b\n2,c\n2,d\n", r"2 ids more than once \(1, 2\)"),
        ("list.csv", "id,words\n1,a\n", "none of the columns text, caption, prompt"),
        ("list.csv", "id,text\n1\n", "a row holds None where a prompt should be"),
        ("list.json", "[1, 2]", "a row holds 1 where a prompt should be"),
        ("list.json", "3", "neither a list nor a mapping"),
        ("list.json", '["a', "is no list of prompts"),
        ("list.txt", "\n \n", "holds 0 prompts, fewer than one"),
        ("list.txt", "\xff\xfe\x00", "is no list of prompts"),
    ],
)
def test_broken_lists(name: str, content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=said):
        PromptFile(tmp_path / name).rows(None)


def test_too_short_a_list(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a cat\n")
    with pytest.raises(ValueError, match="holds 1 prompts, fewer than the 2 that are asked"):
        PromptFile(tmp_path / "list.txt").rows(2)


def test_classes_and_nothing() -> None:
    rows = ClassList(3).rows(7)
    assert [row["label"] for row in rows] == [0, 1, 2, 0, 1, 2, 0]
    assert len({row["file"] for row in rows}) == 7 and len(ClassList(5).rows(None)) == 5
    assert [row["prompt"] for row in NoPrompts().rows(2)] == ["", ""]
    with pytest.raises(ValueError, match="--num is missing"):
        NoPrompts().rows(None)
    assert list_hash(rows) != list_hash(ClassList(2).rows(7))


@given(st.text())
def test_a_clean_caption_has_one_line_and_no_ends(text: str) -> None:
    found = clean(text)
    assert found == found.strip() and len(found.splitlines()) <= 1
    assert clean(found) == found and found.split() == text.split()


def test_what_may_surprise_is_said() -> None:
    rows = [{"prompt": "a"}, {"prompt": "a"}, {"prompt": " ".join(["w"] * 300)}]
    assert [line.partition(" ")[0] for line in remarks(rows)] == ["1", "1"]
    assert "at most 300" in remarks(rows)[1] and remarks([{"prompt": "a"}]) == []
    assert remarks([{"prompt": "1", "label": 1}] * 2) == []

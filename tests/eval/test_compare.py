"""Results side by side: what compares, and every way in which two do not."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from eval.compare import run
from experiments.cli import command

RESULT: dict[str, Any] = {
    "format": 1,
    "command": "python -m eval.fid_coco30k",
    "scores": {
        "eval/fid": {"value": 12.5, "low": 12.0, "high": 13.0, "n": 64, "model": "Inception"},
        "eval/clip_score": {"value": 0.25, "low": None, "high": None, "n": 64, "scale": "cosine"},
    },
    "protocol": {
        "name": "coco30k",
        "changed": ["num"],
        "unknown": [],
        "n": 64,
        "list": {"name": "list", "sha256": "a" * 64, "n": 64},
        "reference": {
            "name": "val2014",
            "sha256": "b" * 64,
            "n": 64,
            "prepared": {"resolution": 256, "crop": "square", "filter": "bicubic"},
        },
        "pictures": {"format": "png", "prepared": "as they are", "sizes": [[256, 256]]},
        "features": {"fid": [{"is": "InceptionRows", "weights": "i.pt", "mode": "clean"}]},
    },
    "pictures": {"sampling": {"steps": 12}},
    "versions": {"torch": "2.14", "pillow": "13.0"},
}
CHANGES: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "n": (("protocol", "n"), 32, "n is 64 in a and 32 in b"),
    "list": (("protocol", "list", "sha256"), "c" * 64, "list.sha256 is aaaaaaaaaaaa in a"),
    "no list": (("protocol", "list"), None, "list.sha256 is aaaaaaaaaaaa in a and None in b"),
    "reference": (("protocol", "reference", "sha256"), "c" * 64, "reference.sha256"),
    "size of the reference": (("protocol", "reference", "n"), 40504, "reference.n is 64"),
    "mode": (
        ("protocol", "features", "fid"),
        [{"is": "InceptionRows", "weights": "i.pt", "mode": "legacy_tensorflow"}],
        "features.fid.0.mode is clean in a and legacy_tensorflow in b",
    ),
    "features": (
        ("protocol", "features", "fid"),
        [{"is": "DinoRows", "weights": "d.pt"}],
        "features.fid.0.is is InceptionRows in a and DinoRows in b",
    ),
    "crop": (("protocol", "reference", "prepared", "crop"), "adm", "crop is square in a and adm"),
    "filter": (("protocol", "reference", "prepared", "filter"), "box", "filter is bicubic in a"),
    "resolution": (("protocol", "reference", "prepared", "resolution"), 64, "resolution is 256"),
    "preparation": (("protocol", "pictures", "prepared"), {"crop": "adm"}, "pictures.prepared"),
    "picture format": (("protocol", "pictures", "format"), "jpeg", "format is png in a and jpeg"),
    "a score's model": (("scores", "eval/fid", "model"), "other", "eval/fid: model is Inception"),
    "a score's n": (("scores", "eval/fid", "n"), 63, "eval/fid: n is 64 in a and 63 in b"),
}


def write(folder: Path, name: str, *changes: tuple[tuple[str, ...], Any]) -> Path:
    content = copy.deepcopy(RESULT)
    for path, value in changes:
        node = content
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
    (folder / name).mkdir()
    (folder / name / "result.json").write_text(json.dumps(content))
    return folder / name


def call(*words: Any) -> int:
    return command(run, [str(word) for word in words])


def test_results_made_alike_stand_side_by_side(tmp_path: Path, capsys: Any) -> None:
    one = write(tmp_path, "a")
    other = write(
        tmp_path,
        "b",
        (("scores", "eval/fid", "value"), 11.25),
        (("pictures", "sampling"), {"steps": 6}),
        (("protocol", "changed"), []),
        (("versions", "torch"), "2.15"),
    )
    assert call(one, other / "result.json") == 0
    out = capsys.readouterr().out
    assert "12.5 (12 to 13), n 64" in out and "11.25 (12 to 13), n 64" in out
    assert "0.25, n 64" in out and "*" not in out
    assert "note: torch is 2.14 in a and 2.15 in b" in out


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_is_refused_and_named(name: str, tmp_path: Path, capsys: Any) -> None:
    path, value, said = CHANGES[name]
    words = [write(tmp_path, "a"), write(tmp_path, "b", (path, value))]
    assert call(*words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: these do not compare: ") and said in err
    assert err.count("\n") == 1 and "--force" in err
    assert call(*words, "--force") == 0
    out = capsys.readouterr().out
    assert "b *" in out and "does not compare: " in out and said.partition(" is ")[0] in out


def test_every_difference_is_named(tmp_path: Path, capsys: Any) -> None:
    names = ["list", "crop", "mode", "reference"]
    changes = [CHANGES[name][:2] for name in names]
    one, other, third = write(tmp_path, "a"), write(tmp_path, "b", *changes), write(tmp_path, "c")
    assert call(one, third, other) == 2
    err = capsys.readouterr().err
    assert all(CHANGES[name][2] in err for name in names) and " in c" not in err


def test_what_is_no_result(tmp_path: Path, capsys: Any) -> None:
    one = write(tmp_path, "a")
    (tmp_path / "b.json").write_text("[]")
    (tmp_path / "c.json").write_text("{")
    for words, said in (
        ([one], "name at least two results"),
        ([one, one], "the same result is named twice"),
        ([one, tmp_path / "b.json"], "is no result of an evaluation: it lacks scores, protocol"),
        ([one, tmp_path / "c.json"], "c.json is no result: "),
        ([one, tmp_path / "nothing"], "nothing is no result: No such file"),
    ):
        assert call(*words) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1

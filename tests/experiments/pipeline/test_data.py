"""What a run says of its data, and which data it refuses."""

import json
import re
from pathlib import Path

import pytest

from experiments import run as run_command
from experiments.cli import command
from experiments.settings import UserError
from tests import planted
from tests.micro_runs import go

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:The dirpath has changed", "ignore:Your `IterableDataset`"
)


def pairs(count: int, name: str = "{:06d}") -> dict[str, bytes]:
    members = {}
    for i in range(count):
        image = planted.encoded(i, size=(16, 16), suffix=".png")
        members |= {f"{name.format(i)}.png": image, f"{name.format(i)}.txt": b"a square"}
    return members


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Give a function that runs the command, and returns its exit code and the lines it wrote."""
    monkeypatch.chdir(tmp_path)

    def go(paper: str, *words: str) -> tuple[int, list[str]]:
        options = ["--scale", "micro", "--out", "out", "logger=csv", "cache=cache", *words]
        code = command(run_command.run, ["--paper", paper, *options])
        told = capfd.readouterr()
        assert "Traceback" not in told.err
        return code, [line.strip() for line in (told.out + told.err).splitlines()]

    return go


def test_every_split_says_what_it_holds(run) -> None:
    members = pairs(96)
    members |= {f"{i:06d}.png": b"junk" for i in range(0, 96, 32)}
    members |= {f"{i:06d}.txt": b"" for i in (5, 6)}
    planted.tar(Path("a, b/00000.tar"), members)
    code, lines = run("paella", "data.shards=a, b", "tokenizer.ckpt=null")
    assert code == 0
    (train,) = (line for line in lines if line.startswith("train: "))
    (val,) = (line for line in lines if line.startswith("val: "))
    (marker,) = Path("cache").glob("encode-*/done.json")
    what = json.loads(marker.read_text())["what"]
    held_out, skipped = what["skipped"]["filtered: other split"], what["skipped"]
    bad = sum(n for reason, n in skipped.items() if reason in ("corrupt image", "no caption"))
    assert bad and what["count"] + held_out + bad == skipped["seen"] == 96
    assert train.startswith(
        f"train: {what['count']} samples, {held_out} validation, {bad} skipped: "
    )
    assert "a, b/00000.tar: " in train
    assert val.startswith("val: ") and " training, " in val
    (over,) = (line for line in lines if line.startswith("train, over all passes: "))
    assert " validation, " in over and " corrupt image" in over  # pictures are read

    code, lines = run("vqgan")  # scenes
    assert code == 0 and any(line.endswith(" samples, 0 skipped") for line in lines)


@pytest.mark.parametrize("value", ["none", "none/*.tar", "a/0.tar,none.tar", "a/{0,1}.tar", "b:c"])
def test_a_pattern_that_matches_nothing_is_refused(run, value: str) -> None:
    planted.tar(Path("a/0.tar"), pairs(1))
    for setting in ("data.shards", "data.val_shards"):
        code, lines = run("vqgan", "data.shards=a", f"{setting}={value}")
        assert code == 2 and len(lines) == 1
        assert lines[0].startswith(f"error: {setting}: shard pattern '{value}': ")
    assert not Path("cache").exists() and not Path("out").exists()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"0.tar": pairs(48, "photo v1.{} (clean)")}, "have the key 'photo v1', the file name up"),
        ({f"{i}.tar": pairs(1, "image") for i in range(12)}, "all 12 images .* set val_shards"),
        ({"0.tar": pairs(48, "p{0}.{0}")}, r"no image \(a key ends at the first dot"),
        (
            {
                "0.tar": {
                    n: b"\xff\xfe\xff" if n.endswith("txt") else d for n, d in pairs(48).items()
                }
            },
            r"of \d+ samples were skipped: \d+ bad text \(last: 0",
        ),
    ],
)
def test_data_of_which_nothing_is_left_say_why(run, files: dict, says: str) -> None:
    for name, members in files.items():
        planted.tar(Path("a") / name, members)
    code, lines = run("vqgan", "data.shards=a")
    errors = [line for line in lines if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1
    assert re.search(says, errors[0]), errors[0]


@pytest.mark.parametrize("cache", ["true", "false"])
def test_a_label_that_the_model_has_no_class_for_is_named(cache: str, tmp_path: Path) -> None:
    """With pictures too, whose data has a hook of its own in the place of the module's."""
    words = ["data=digits", "condition=label", "model.num_classes=5", "classes=[]"]
    with pytest.raises(UserError, match=r"model\.num_classes is 5, but the data have"):
        go("ldmae", tmp_path / "out", tmp_path / "c", "logger=csv", f"data.cache={cache}", *words)

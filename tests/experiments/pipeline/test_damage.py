"""Damaged results and arbitrary checkpoints: mended, or refused in one line; never unnoticed."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments import convert, sample
from experiments.cli import command
from experiments.run import run
from tests.micro_runs import QUIET

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]
PAPER = ["--paper", "paella", "--scale", "micro", "logger=csv", "eval.heldout=0"]
FUZZ = settings(
    deadline=None,
    max_examples=12,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def done(root: Path) -> int:
    return command(run, [*PAPER, f"cache={root / 'cache'}", "--out", str(root / "out")])


def results(root: Path) -> list[bytes]:
    out = root / "out"
    files = [out / name for name in ("metrics.json", "checkpoint.safetensors")]
    return [*(f.read_bytes() for f in files), Image.open(out / "samples.png").tobytes()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    assert done(root) == 0
    return root


def damage(content: bytes, how: str, place: float) -> bytes:
    """Change, cut or overwrite bytes from a place in [0, 1) on."""
    at = int(place * len(content))
    rest = content[at:]
    if how == "flip":
        return content[:at] + bytes([b ^ 16 for b in rest[:1]]) + rest[1:]
    if how == "cut":
        return content[:at]
    return content[:at] + {"zero": b"\0", "junk": b"\xf7"}[how] * len(rest[:64]) + rest[64:]


@given(data=st.data(), how=st.sampled_from(["flip", "cut", "zero", "junk", "gone"]))
@settings(FUZZ)
def test_damage_to_any_file_of_the_store(
    data: st.DataObject, how: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The run is as it was; also where the damaged stage, or all after it, had not ended."""
    root = tmp_path / "copy"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root)
    stages = sorted(p for p in (root / "cache").iterdir() if p.is_dir() and p.name != "runs")
    stage = data.draw(st.sampled_from([p.name for p in stages]))
    files = sorted(p for p in (root / "cache" / stage).rglob("*") if p.is_file())
    name = data.draw(st.sampled_from([str(p.relative_to(root)) for p in files]))
    undone = data.draw(st.sampled_from(["nothing", "score", "both"]))
    if undone != "nothing":
        shutil.rmtree(root / "out")
        (again,) = (root / "cache").glob("score-*/done.json")
        again.unlink()
    if undone == "both":
        (root / "cache" / stage / "done.json").unlink(missing_ok=True)
    file = root / name
    if how == "gone":
        file.unlink(missing_ok=True)
    elif file.exists():
        content = file.read_bytes()
        file.unlink()  # a link to a result of the run folder would be damaged with it
        file.write_bytes(damage(content, how, data.draw(st.integers(0, 999)) / 1000))
    code, err = done(root), capsys.readouterr().err
    assert (code, err) == (0, "")
    assert results(root) == results(whole)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.text(max_size=8),
    st.sampled_from([0.5, -1e300, float("nan")]),
    st.sampled_from(
        [
            torch.zeros(2, 3),
            torch.zeros(()),
            torch.full((2,), torch.nan),
            torch.zeros(0),
            torch.ones(2, dtype=torch.int64),
            torch.ones(1) * 1j,
        ]
    ),
)
NAMES = st.sampled_from(
    [
        "state_dict",
        "model",
        "hyper_parameters",
        "config",
        "paper",
        "paella",
        "vqgan",
        "sampling",
        "first_stage",
        "tokenizer",
        "text",
        "optim",
        "epoch",
        "encoder.conv_in.weight",
        "ema",
    ]
)
KEYS = st.one_of(NAMES, st.text(max_size=5), st.integers(0, 3))
CONTENTS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=5)),
    max_leaves=12,
)


def refused(path: Path, capsys: pytest.CaptureFixture) -> None:
    out = path.parent / "out"
    for act, words in (
        (sample.run, ["--ckpt", str(path), "--prompt", "a", "--out", str(out)]),
        (
            convert.run,
            ["--ckpt", str(path), "--from", "transformer", "--out", str(out / "x.safetensors")],
        ),
        (
            convert.run,
            ["--ckpt", str(path), "--from", "tokenizer", "--out", str(out / "x.safetensors")],
        ),
    ):
        assert command(act, words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and not out.exists()


@given(content=CONTENTS)
@settings(FUZZ, max_examples=60)
def test_any_content_as_a_checkpoint(
    content: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", capsys)


@given(
    config=st.dictionaries(
        NAMES,
        st.one_of(
            st.none(),
            st.integers(),
            st.text(max_size=5),
            st.sampled_from(["paella", "vqgan"]),
            st.dictionaries(NAMES, st.integers(), max_size=2),
            st.lists(st.integers(), max_size=2),
        ),
    )
)
@settings(FUZZ, max_examples=40)
def test_any_settings_of_a_checkpoint(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A safetensors file without tensors."""
    header = json.dumps({"__metadata__": {"config": json.dumps(config)}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refused(path, capsys)

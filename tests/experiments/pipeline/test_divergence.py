"""An absurd learning rate ends the run of every paper in one line, and keeps nothing of it."""

import re
from pathlib import Path

import pytest

from experiments.cli import command
from experiments.papers.registry import PAPERS
from experiments.run import run
from tests.micro_runs import QUIET

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("words", [["optim.lr=1e4"], ["optim.lr=1e12", "optim.clip=0"]], ids=str)
@pytest.mark.parametrize("paper", PAPERS)
def test_an_absurd_learning_rate(
    paper: str, words: list[str], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    line = ["--paper", paper, "--scale", "micro", f"cache={cache}", "logger=csv", "--out", str(out)]
    assert command(run, [*line, *words]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    rate = float(words[0].partition("=")[2])
    found = re.match(r"error: (\w+) diverged at batch \d+ with learning rate (\S+): ", error)
    assert found and float(found[2]) == rate
    assert not out.exists()
    last = max(cache.glob(f"{found[1]}-*/"), key=lambda p: p.stat().st_mtime_ns)
    assert not (last / "done.json").exists()

"""No reference case goes unread, and no golden test passes without its case."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="module")
def without_cases(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess:
    """The golden tests, told to look for their cases in an empty folder."""
    empty = tmp_path_factory.mktemp("golden")
    command = [sys.executable, "-m", "pytest", "-m", "golden", "--golden", str(empty)]
    options = ["-q", "--tb=line", "-p", "no:cacheprovider"]
    # the plugin as if it were installed, so that this also holds for a bare checkout
    env = {**os.environ, "PYTEST_PLUGINS": "tests.pytest_golden", "PYTHONPATH": str(ROOT)}
    env.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(
        [*command, *options], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )


def test_nothing_passes_without_its_case(without_cases: subprocess.CompletedProcess) -> None:
    closing = without_cases.stdout.strip().splitlines()[-1]
    assert without_cases.returncode == 1, without_cases.stdout
    assert re.search(r"\d+ failed", closing), closing
    assert not re.search("passed|skipped|xfailed|xpassed|error", closing), closing


def test_the_option_is_installed_with_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    plugin = "tests.pytest_golden"  # its name too, or conftest.py would register it again
    assert project["project"]["entry-points"]["pytest11"] == {plugin: plugin}
    assert "tests" in project["tool"]["setuptools"]["packages"]["find"]["include"]


def test_every_case_is_asked_for(without_cases: subprocess.CompletedProcess) -> None:
    asked = set(re.findall(r"golden case (\S+) is missing under", without_cases.stdout))
    there = {p.parent.relative_to(GOLDEN).as_posix() for p in GOLDEN.rglob("case.json")}
    assert {"paella", "vqgan"} <= {name.partition("/")[0] for name in there}
    assert there - asked == set()
    assert asked - there == set()

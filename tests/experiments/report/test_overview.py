"""The page of all sweeps: claims with verdicts, every table within two clicks, numbers as CSV."""

import csv
import re
from pathlib import Path
from shutil import copy2
from typing import Any

import pytest

from experiments.cli import command
from experiments.grid import SweepRun, read_sweep
from experiments.papers.registry import load
from experiments.pipeline.plan import plan
from experiments.report import __main__ as report
from experiments.report.overview import STATES, Done, judged, write_overview
from experiments.report.published import load_all

ROOT = Path(__file__).parents[3]
CONFIG = load("vqgan", "micro")
PLAN = plan("vqgan", CONFIG)


def done(name: str, rows: dict[tuple[Any, ...], dict[str, float]]) -> Done:
    sweep = read_sweep(ROOT / "sweeps" / f"{name}.yaml")
    names = [n for n, form in sweep.forms.items() if "values" in form]
    runs = [
        SweepRun(
            dict(zip(names, key, strict=True)),
            [],
            name.rpartition("_")[0],
            "tiny",
            CONFIG,
            Path("x"),
            PLAN,
            {s: {"value": v, "low": v - 0.1, "high": v + 0.1, "n": 9} for s, v in scores.items()},
        )
        for key, scores in rows.items()
    ]
    return Done(sweep, runs)


@pytest.fixture
def sweeps() -> list[Done]:
    steps = {2: 9.0, 4: 5.0, 6: 4.0, 8: 3.0, 12: 2.5, 24: 4.0}
    return [
        done(
            "paella_steps",
            {
                (k,): {
                    "eval/fd_scenes": v,
                    "eval/scene_accuracy": 1 - v / 10,
                    "eval/clip_scenes": 1 / v,
                }
                for k, v in steps.items()
            },
        ),
        done("vq_diffusion_truncation", {(0.8,): {}, (0.86,): {}}),
    ]


def test_the_page_holds_claims_tables_and_numbers(sweeps: list[Done], tmp_path: Path) -> None:
    made = write_overview(sweeps, tmp_path, "python -m experiments.report <x>")
    assert sorted(tmp_path.iterdir()) == sorted(made)
    page = (tmp_path / "index.html").read_text()
    assert "The distance is best near 12 steps" in page and "&lt;x&gt;" in page
    assert "vq_diffusion_truncation</h2>" not in page  # nothing of it was run
    # every table of every paper: one click on a link of the contents, which leads somewhere
    ids = set(re.findall(r'id="([^"]+)"', page))
    links = re.findall(r'href="#([^"]+)"', page)
    assert set(links) <= ids and len(set(links)) == len(ids)
    for paper, published in load_all().items():
        assert {f"{paper}-{name}" for name in published.tables} <= set(links)
    assert "://" not in re.sub(r"data:[^\"]+", "", page)
    with open(tmp_path / "measured.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 19 and rows[1]["settings"] == "sampling.steps=2"
    with open(tmp_path / "claims.csv", newline="") as file:
        verdicts = {row["claim"]: row["verdict"] for row in csv.DictReader(file)}
    assert verdicts["The distance is best near 12 steps and grows with more"] == "holds"
    assert verdicts["The CLIP score goes on rising with steps"] == "does not hold"
    assert verdicts["The best truncation rate lies between 0.84 and 0.88"] == "not measured"


def test_every_claim_has_one_verdict(sweeps: list[Done]) -> None:
    found = judged(sweeps)
    assert len(found) == sum(len(p.claims) for p in load_all().values())
    assert {c.verdict.state for c in found} <= {*STATES}


def test_the_command_refuses_what_was_never_run(tmp_path: Path, capsys, monkeypatch) -> None:
    empty, sweeps = tmp_path / "empty", tmp_path / "sweeps"
    for folder in (empty, sweeps):
        folder.mkdir()
    copy2(ROOT / "sweeps" / "paella_steps.yaml", sweeps)
    monkeypatch.setattr(report, "SWEEPS", sweeps)
    monkeypatch.chdir(empty)
    for argv, says in [
        ([], "no run of paella_steps is done"),
        (["none.yaml"], "there is no sweep file none.yaml"),
        (["word"], "'word' is neither a sweep file nor a setting"),
    ]:
        assert command(report.run, argv) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
    assert not list(empty.iterdir())

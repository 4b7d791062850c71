"""Tables of a sweep: intervals, what was published beside what was measured, the best and ties."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from experiments.distributions import listed
from experiments.grid import Sweep, SweepRun, read_sweep
from experiments.papers.registry import PAPERS, load
from experiments.pipeline.plan import plan
from experiments.report import tables
from experiments.report.published import (
    REPORTED,
    Claim,
    Published,
    Table,
    all_published,
    load_published,
)

SWEEPS = {p.stem: p for p in (Path(__file__).parents[3] / "sweeps").glob("*.yaml")}
KINDS = Sweep("s", "eval/a", False, [], "grid", {})
LOWEST = Sweep("s", "eval/a", True, [], "grid", {})
NOTHING = Published()


def sweep_run(scores: dict[str, Any], out: Path = Path("runs/x"), **settings: Any) -> SweepRun:
    run = load("vqgan", "micro")
    return SweepRun(settings, [], "vqgan", "micro", run, out, plan("vqgan", run), scores)


def score(value: float, half: float = 1.0) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": 5}


def test_scans_have_a_table_and_a_chart(tmp_path: Path) -> None:
    def scores(x: float) -> dict:
        values = {"eval/a": x, "eval/a/noise=0.1": 2 * x, "eval/a/noise=0.05": 1.5 * x}
        return {name: score(value) for name, value in values.items()}

    runs = [sweep_run(scores(1.0), kind="x"), sweep_run(scores(3.0), kind="y")]
    (_, scan), _, _ = tables.summarize(KINDS, runs, NOTHING)
    assert scan.title == "a against noise" and scan.heads == ["a", "0", "0.05", "0.1"]
    assert scan.rows[1] == ["kind=y", "3.0 (2.0 to 4.0)", "4.5 (3.5 to 5.5)", "6.0 (5.0 to 7.0)"]
    made = tables.write_sweep(KINDS, runs, tmp_path, "command", NOTHING)
    assert [p.name for p in made] == ["table.csv", "table.html", "picture.png", "a-noise.png"]
    assert sorted(tmp_path.iterdir()) == sorted(made)
    page = (tmp_path / "table.html").read_text()
    assert page.count("<picture>") == 2 and "://" not in page and "6.0 (5.0 to 7.0)" in page


def test_published_numbers_stand_beside_measured_ones() -> None:
    table = Table(
        columns={"PSNR": "eval/a", "gFID": None},
        rows={"x": {"PSNR": 9.5, "gFID": 4.0}},
        setting="kind",
        sweep="s",
    )
    published = Published({"t": table}, [Claim("It is so.", sweep="other")]).of_sweep("s")
    scores = [{"eval/a": {"value": v}, "eval/b": {"value": 1}} for v in (1.0, 2.0)]
    runs = [sweep_run(s, kind=kind) for s, kind in zip(scores, "xy", strict=True)]
    (main,), notes, sources = tables.summarize(KINDS, runs, published)
    # fewer runs than columns: a column for each run
    assert main.heads == ["kind", "x", "y"]
    assert main.rows == [
        ["a", "1", "2"],
        ["PSNR, published", "9.5", ""],
        ["gFID, published", "4", ""],
    ]
    assert "equal in all runs: b 1" in notes and len(sources) == 1
    (main,), _, _ = tables.summarize(
        KINDS, [sweep_run(scores[0], kind=k) for k in "xyzw"], published
    )
    assert main.heads == ["kind", "a", "PSNR, published", "gFID, published"]
    assert main.rows[:2] == [["x", "1", "9.5", "4"], ["y", "1", "", ""]]


@pytest.mark.parametrize(
    ("sweep", "half", "said"),
    [
        (KINDS, 0.1, "best eval/a: kind=z: 4.00 (3.90 to 4.10)"),
        (LOWEST, 0.1, "best eval/a: kind=x: 1.00 (0.90 to 1.10)"),
        (KINDS, 0.5, "best eval/a: kind=z: 4.0 (3.5 to 4.5); 1 of the other 2 overlap with it"),
        (
            KINDS,
            2.0,
            "best eval/a: kind=z: 4 (2 to 6); but a tie: the intervals of all others "
            "overlap with it",
        ),
    ],
)
def test_the_best_point_is_named_and_so_is_a_tie(sweep: Sweep, half: float, said: str) -> None:
    values = {"x": 1.0, "y": 3.0, "z": 4.0}
    runs = [sweep_run({"eval/a": score(v, half)}, kind=kind) for kind, v in values.items()]
    assert tables.best_line(sweep, runs) == [said]
    assert tables.best_line(Sweep("s", "eval/none", True, [], "grid", {}), runs) == []


def test_equal_values_without_intervals_are_a_tie() -> None:
    runs = [sweep_run({"eval/a": {"value": 1.0}}, kind=kind) for kind in "xy"]
    assert "a tie" in tables.best_line(KINDS, runs)[0]
    assert tables.best_line(KINDS, runs[:1]) == []


def test_points_that_failed_are_told(tmp_path: Path) -> None:
    runs = [sweep_run({}, kind="x"), sweep_run({"eval/a": score(1.0)}, kind="y")]
    runs[0].error = "no file <none.pth>"
    (main,), notes, _ = tables.summarize(KINDS, runs, NOTHING)
    assert main.rows == [["x", "failed"], ["y", "1.0 (0.0 to 2.0)"]]
    assert notes == ["failed: kind=x: no file <none.pth>"]
    lone = [sweep_run({})]
    tables.write_sweep(Sweep("s", None, True, [], "grid", {}), lone, tmp_path, "command", NOTHING)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["table.csv", "table.html"]
    assert "no file &lt;none.pth&gt;" in tables.as_html(KINDS, runs, "c", {}, NOTHING)


def test_the_csv_keeps_every_digit() -> None:
    runs = [sweep_run({"eval/a": score(1 / 3)}, kind="x"), sweep_run({}, kind="y")]
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(runs))))
    assert float(rows[0]["eval/a"]) == 1 / 3 and float(rows[0]["eval/a low"]) == 1 / 3 - 1
    assert (rows[0]["eval/a n"], rows[1]["eval/a"], rows[1]["run"]) == ("5", "", "runs/x")


def test_two_settings_are_a_map_and_three_are_lines() -> None:
    def drawn(**more: Any) -> Any:
        runs = [
            sweep_run({"eval/a": score(x * y)}, **more, **{"s.steps": x, "s.weight": y})
            for x in (1, 2)
            for y in (3, 4)
        ]
        (axes,) = tables.draw(KINDS, runs)["picture.png"].axes
        return axes

    axes = drawn()
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("steps", "weight", "a")
    assert axes.images[0].get_array().tolist() == [[3, 6], [4, 8]]
    axes = drawn(kind="x")
    labels = axes.get_legend_handles_labels()[1]
    assert axes.get_xlabel() == "weight" and labels == ["kind=x steps=1", "kind=x steps=2"]


@pytest.mark.parametrize("path", sorted(REPORTED.glob("*.yaml")), ids=lambda p: p.stem)
def test_published_numbers_say_where_they_come_from(path: Path) -> None:
    published = load_published(path)
    assert path.stem in PAPERS and published.tables
    for table in published.tables.values():
        assert table.title and table.source and table.protocol and table.rows
    for claim in published.claims:
        assert claim.claim and claim.source
    assert len(list(published.provenance())) == len(published.tables) + len(published.claims)


def test_published_rows_are_points_of_their_sweep() -> None:
    found = all_published()
    assert {x.sweep for x in [*found.tables.values(), *found.claims] if x.sweep} <= SWEEPS.keys()
    measured = [(name, table) for name, table in found.tables.items() if table.setting]
    assert measured
    for name, table in measured:
        form = read_sweep(SWEEPS[table.sweep or ""]).forms[table.setting or ""]
        points = {str(v) for v in listed(form) or []}
        assert points & table.rows.keys(), name
        assert table.across or points >= table.rows.keys(), name


def test_wrong_published_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for text, said in [
        ("tables: {a: {evidence: hearsay}}", "evidence must be one of"),
        ("tables: {a: {columns: {X: null}, rows: {r: {Y: 1.0}}}}", "no column 'Y'"),
        ("tables: {a: {title: x}}", "a needs a sweep, or a reason"),
        ("tables: {a: {sweep: x, reason: y}}", "a needs a sweep, or a reason"),
        ("tables: {a: {colums: {}}}", "has no setting 'colums'"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            load_published(path)

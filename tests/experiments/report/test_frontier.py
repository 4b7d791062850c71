"""Papers in one sweep: who is best at a budget, what is drawn beside, and what it costs."""

from pathlib import Path

import numpy as np
import pytest

from experiments.grid import Sweep, SweepRun, make_runs, read_sweep
from experiments.report import tables
from experiments.report.frontier import frontiers, methods, winners
from experiments.report.measured import Done, read_measured
from experiments.report.overview import write_overview
from experiments.report.published import Published

TEXT = """
method: grid
command: [python, -m, experiments.run, "${args}"]
metric: {name: eval/scene_accuracy, goal: maximize}
parameters:
  paper: {values: [paella, improved_vqd, ldmae]}
  scale: {value: micro}
  sampling.steps: {values: [2, 4]}
  sampling.guidance: {values: [1.0, 2.0]}
"""
N = 400


def plant(run: SweepRun, prefix: str, share: float, first: int = 0) -> None:
    """Let a share of the prompts be right, from the first on: two runs share all but the ends."""
    right = (np.arange(N) - first) % N < share * N
    run.right[prefix] = {(i,): bool(ok) for i, ok in enumerate(right)}
    value = float(right.mean())
    half = 1.96 * (value * (1 - value) / N) ** 0.5
    steps = run.settings["sampling.steps"]
    run.scores |= {
        f"{prefix}/scene_accuracy": {"value": value, "low": value - half, "high": value + half},
        f"{prefix}/network_calls": {"value": float(steps), "n": N},
        f"{prefix}/seconds": {"value": 0.01 * steps, "n": N},
        f"{prefix}/parameters": {"value": 1000},
    }


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Sweep, list[SweepRun]]:
    (tmp_path / "all.yaml").write_text(TEXT)
    sweep = read_sweep(tmp_path / "all.yaml")
    runs = make_runs(sweep, [], None)[1]
    shares = {"paella": (0.5, 0.9), "improved_vqd": (0.6, 0.88), "ldmae": (0.4, 0.6)}
    for run in runs:
        late = run.settings["sampling.steps"] == 4
        lost = 0.05 * (run.settings["sampling.guidance"] == 1.0)
        plant(run, "eval", shares[run.paper][late] - lost)
        if run.paper == "improved_vqd":
            plant(run, "vq_diffusion", 0.3)
    return sweep, runs


def test_what_is_drawn_beside_is_a_method_of_its_own(planted) -> None:
    found = methods(planted[1])
    assert list(found) == ["paella", "improved_vqd", "ldmae", "vq_diffusion"]
    beside = found["vq_diffusion"]  # once for both guidances, which it does not read
    wanted = [{"paper": "vq_diffusion", "sampling.steps": n} for n in (2, 4)]
    assert [r.settings for r in beside] == wanted
    alone = methods(planted[1][:5] + planted[1][6:])["vq_diffusion"]
    assert [r.settings for r in alone] == wanted  # also where one guidance is left
    assert beside[0].scores["eval/scene_accuracy"]["value"] == pytest.approx(0.3)
    assert sum(beside[0].right["eval"].values()) == 0.3 * N


def test_a_winner_needs_every_interval_on_its_side(planted) -> None:
    sweep, runs = planted
    (table,) = winners(sweep, runs)
    assert table.heads[:3] == ["network calls", "winner", "by how much"]
    low, high = table.rows
    assert low[:2] == ["2", "improved_vqd"]
    # 0.10 of 400 prompts that only one has right: 1.96 sqrt(0.1 - 0.01) / 20
    assert low[2] == "improved_vqd - paella: 0.10 (0.07 to 0.13)"
    assert low[4] == "0.60 (0.55 to 0.65)\nguidance=2.0" and low[6].startswith("0.30 (")
    # 8 prompts more on shared ones are seen; in other places they would not be
    assert high[:3] == ["4", "paella", "paella - improved_vqd: 0.020 (0.006 to 0.034)"]
    for run in runs:
        if run.paper == "paella" and run.settings["sampling.steps"] == 4:
            plant(run, "eval", 0.9, first=200)
    *_, high = winners(sweep, runs)[0].rows
    assert high[:2] == ["4", "no winner"] and high[2].startswith("paella - improved_vqd: 0.02 (-0.")


def test_runs_that_are_missing_are_told(planted) -> None:
    sweep, runs = planted
    for run in runs:
        if run.paper == "ldmae" or run.settings["sampling.steps"] == 4:
            run.scores, run.right = {}, {}
    low, high = winners(sweep, runs)[0].rows
    assert low[1] == "improved_vqd\nof 3 that were run" and low[5] == ""
    assert high == ["4", "", "", "", "", "", ""]


def test_other_prompts_are_not_paired(planted) -> None:
    """Without shared prompts the interval is that of two independent shares, twice as wide."""
    sweep, runs = planted
    other = make_runs(sweep, ["data.val_size=64", "sampling.guidance=2.0"], None)[1]
    for run in runs:
        if run.paper == "paella":
            run.plan = other[0].plan
    assert "0.10 (0.03 to 0.17)" in winners(sweep, runs)[0].rows[0][2]


def test_charts_show_each_at_its_best_and_at_fixed_settings(planted) -> None:
    sweep, runs = planted
    figures = frontiers(sweep, runs)
    assert list(figures) == [
        "scene_accuracy-network_calls.png",
        "scene_accuracy-seconds.png",
        "scene_accuracy-parameters.png",
        "scene_accuracy-network_calls-guidance=1.0.png",
        "scene_accuracy-network_calls-guidance=2.0.png",
    ]
    best, sizes, fixed = (
        {line.get_label(): line.get_xydata().tolist() for line in figures[name].axes[0].lines}
        for name in list(figures)[1:4]
    )
    assert best["paella"] == [[0.02, 0.5], [0.04, 0.9]]
    assert sizes["paella"] == [[1000, 0.9]]
    assert fixed["paella"] == [[2.0, 0.45], [4.0, 0.85]]
    assert fixed["vq_diffusion"] == [[2.0, pytest.approx(0.3)], [4.0, pytest.approx(0.3)]]


def test_the_page_of_a_sweep_begins_with_the_winners(planted, tmp_path: Path) -> None:
    sweep, runs = planted
    made = tables.write_sweep(sweep, runs, tmp_path / "out", "command", Published())
    page = (tmp_path / "out" / "table.html").read_text()
    assert page.index("Who is best at a budget") < page.index("<h2>Charts") < page.index("Scores")
    assert len(made) == 2 + 5 and page.count("<picture>") == 5
    assert "Right more often than" not in page  # of 12 runs with the first one


def test_papers_beside_each_other_come_first_on_the_page_of_all(planted, tmp_path: Path) -> None:
    """Above the claims; what was measured gives the same winners when it is read again."""
    sweep, runs = planted
    write_overview([Done(sweep, runs)], tmp_path / "out", "command")
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.index('id="sweep-all"') < page.index("What is claimed")
    (again,) = read_measured(tmp_path / "out" / "measured.csv", tmp_path)
    assert winners(*again) == winners(sweep, runs)

"""Seeds as an axis, and differences on shared prompts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.grid import Sweep, SweepRun
from experiments.papers.registry import load
from experiments.pipeline.plan import plan
from experiments.report import tables
from experiments.report.published import Published
from experiments.report.repeated import difference, mean_of, over_seeds


def sweep_run(value: float, right: list[int] | None = None, **settings: Any) -> SweepRun:
    config = load("vqgan", "micro")
    score = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 10}
    made = plan("vqgan", config)
    places = {"eval": {(i,): bool(ok) for i, ok in enumerate(right or [])}}
    scores = {"eval/a": score}
    return SweepRun(settings, [], "vqgan", "micro", config, Path("x"), made, scores, right=places)


def test_seeds_become_a_mean_with_the_interval_of_student() -> None:
    runs = [
        sweep_run(v, kind=k, seed=s)
        for k, base in (("x", 1.0), ("y", 5.0))
        for s, v in enumerate((base, base + 1, base + 2))
    ]
    x, y = over_seeds(runs)
    assert x.settings == {"kind": "x"} and y.scores["eval/a"]["value"] == pytest.approx(6)
    score = x.scores["eval/a"]
    assert score["low"] == pytest.approx(2 - 4.302653 / 3**0.5)  # s = 1, t of 2 degrees
    assert score["n"] == 30 and score["seeds"] == 3
    assert over_seeds(runs[:3]) == runs[:3]  # a sweep over seeds alone shows each of them
    assert over_seeds(runs[::3]) == runs[::3]
    assert mean_of([runs[0].scores["eval/a"]]) == runs[0].scores["eval/a"]


def test_a_seed_that_failed_is_told_and_the_others_count() -> None:
    runs = [
        sweep_run(1.0, kind="x", seed=0),
        sweep_run(2.0, kind="x", seed=1),
        sweep_run(3.0, kind="y", seed=0),
    ]
    runs[1] = replace(runs[1], scores={}, error="no disk")
    x, _ = over_seeds(runs)
    assert x.error == "no disk" and x.scores["eval/a"]["value"] == 1.0


def test_the_difference_is_that_of_mcnemar() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(400) < 0.7, rng.random(400) < 0.6
    found = difference(sweep_run(0, a.tolist()), sweep_run(0, b.tolist()))
    assert found is not None
    more, less = int((a & ~b).sum()), int((b & ~a).sum())
    assert found["value"] == pytest.approx((more - less) / 400) and found["n"] == 400
    spread = np.sqrt((more + less - (more - less) ** 2 / 400) / 399) * 20 / 400 * 1.959964
    assert found["high"] - found["value"] == pytest.approx(spread)
    assert difference(sweep_run(0, [1]), sweep_run(0)) is None


def test_pairing_narrows_the_interval_and_has_a_table() -> None:
    right = [1] * 90 + [0] * 10
    worse = [1] * 88 + [0] * 12
    runs = [sweep_run(0.9, right, kind="x"), sweep_run(0.88, worse, kind="y")]
    sweep = Sweep("s", "eval/a", False, [], "grid", {})
    main, paired = tables.summarize(sweep, runs, Published()).tables
    assert main.title == "Scores"
    assert paired.title == "Right more often than kind=x, on the same prompts"
    assert paired.rows == [["kind=y", "-0.02 (-0.05 to 0.01)", "100"]]

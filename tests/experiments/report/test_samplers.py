"""Samplers beside the papers' own loops: what stands for each, and how it compares."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.grid import SweepRun
from experiments.papers.registry import load
from experiments.pipeline.plan import plan
from experiments.report.samplers import beside_own, frontiers, tables

CONFIG = load("paella", "micro")
PLAN = plan("paella", CONFIG)


def done(accuracy: float, *, repeat: int = 0, seeded: bool = False, **settings: Any) -> SweepRun:
    """A run whose first pictures are right; `seeded` where it has repetitions."""
    n = 200
    names = {"name": "name", "t": "temperature", "gamma": "gamma"}
    at = {k: f"sampling.sampler.{v}" for k, v in names.items()}
    shown = {at.get(k, f"sampling.{k}"): v for k, v in settings.items()}
    argv = ["--paper=paella", *(f"--{k}={v}" for k, v in shown.items())]
    if seeded:
        shown["eval.seed"] = 10_000_000 * repeat
    scores = {
        "eval/scene_accuracy": {"value": accuracy, "low": accuracy - 0.05, "high": 1.0, "n": n},
        "eval/network_calls": {"value": float(settings.get("steps", 5)), "n": n},
    }
    right = {"eval": {(i,): bool(i < accuracy * n) for i in range(n)}}
    made = SweepRun(shown, argv, "paella", "micro", CONFIG, Path("x"), PLAN, scores, right=right)
    made.repeat = repeat
    return made


def test_each_sampler_stands_at_its_best_and_against_the_own_loop() -> None:
    own = [done(a, steps=k) for k, a in ((4, 0.6), (8, 0.8))]
    other = [
        done(a, name="posterior", t=t, steps=k)
        for k, t, a in ((4, 0.3, 0.7), (4, 1.0, 0.9), (8, 0.3, 0.5), (8, 1.0, 0.4))
    ]
    rows = beside_own([own, other])
    assert [(r.steps, r.sampler, r.settings, r.told) for r in rows] == [
        (4, "own", "", ""),
        (4, "posterior", "temperature=1.0", "better"),
        (8, "own", "", ""),
        (8, "posterior", "temperature=0.3", "worse"),
    ]
    assert rows[1].over_own is not None
    assert np.isclose(rows[1].over_own["value"], 0.3) and rows[1].over_own["n"] == 200
    heads, lines = tables(rows)["paella"]
    assert len(lines) == 4 and all(len(line) == len(heads) for line in lines)
    assert lines[1][-1] == "better" and lines[1][-2].startswith("30")
    (figure,) = frontiers(rows).values()
    assert {line.get_label() for line in figure.axes[0].get_lines()} == {"own", "posterior"}


def test_what_was_measured_again_wins_over_what_one_seed_chose() -> None:
    """A value that one seed saw at 0.95 is not the best of those that others measured at 0.7."""
    own = [done(0.6, steps=n, repeat=k, seeded=True) for n in (4, 8) for k in range(3)]
    again = [done(0.7, name="eb", t=0.6, steps=4, repeat=k, seeded=True) for k in (1, 2)]
    lucky = done(0.95, name="eb", t=1.0, steps=4, seeded=True)
    first, second, _ = beside_own([own, [*again, lucky]])
    assert first.run.scores["eval/scene_accuracy"]["seeds"] == 3
    assert second.settings == "temperature=0.6" and second.over_own is not None
    assert np.isclose(second.over_own["value"], 0.1)  # of the seeds that both have


def test_a_sampler_without_steps_stands_beside_the_papers_usual_number() -> None:
    usual = CONFIG.sampling_settings()["steps"]
    rows = beside_own([[done(0.6, steps=usual)], [done(0.6, name="eb", gamma=0.1)]])
    assert [r.steps for r in rows] == [usual, usual] and rows[1].told == "not distinguishable"


def test_bounds_of_an_adaptive_sampler_are_budgets() -> None:
    found = [
        done(a, name="eb", gamma=g, t=t) for g in (0.1, 1.0) for t, a in ((0.3, 0.7), (1, 0.6))
    ]
    rows = beside_own([found])
    assert [r.settings for r in rows] == [f"gamma={g} temperature=0.3" for g in (0.1, 1.0)]


def test_a_paper_without_samplers_and_other_settings_are_left_out() -> None:
    assert beside_own([[done(0.6, steps=4)], [done(0.9, steps=4, guidance_end=3.0)]]) == []
    rows = beside_own([[done(0.9, steps=4, guidance_end=3.0)], [done(0.7, name="eb", steps=4)]])
    assert [r.sampler for r in rows] == ["eb"] and rows[0].told == ""

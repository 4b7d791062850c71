"""Claims of papers: planted runs that fulfil, contradict or leave open what is said."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.metric import Metric
from eval.scorers import METRICS
from experiments.agent import text_of
from experiments.distributions import listed
from experiments.grid import SweepRun, read_sweep
from experiments.papers.registry import load
from experiments.pipeline.plan import plan
from experiments.report.claims import verdict
from experiments.report.published import Claim, all_published, load_published
from experiments.report.scores import scan_value

ROOT = Path(__file__).parents[3]
KNOWN = {"fd": Metric("", "", better="lower"), "acc": Metric("", "", better="higher")}
CONFIG = load("vqgan", "micro")
PLAN = plan("vqgan", CONFIG)


def sweep_run(value: float, half: float = 0.1, name: str = "eval/fd", **settings: Any) -> SweepRun:
    score = {"value": value, "low": value - half, "high": value + half, "n": 9}
    return SweepRun(settings, [], "vqgan", "micro", CONFIG, Path("x"), PLAN, {name: score})


def runs(values: dict[Any, float], half: float = 0.1, **settings: Any) -> list[SweepRun]:
    return [sweep_run(v, half, k=key, **settings) for key, v in values.items()]


def said(test: str, *values: Any, score: str = "eval/fd", **where: Any) -> Claim:
    return Claim("it is so", "T", "paper", "s", score, test, "k", list(values), where)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("claim", "values", "half", "state"),
    [
        (said("better", "a", "b"), {"a": 1.0, "b": 2.0}, 0.1, "holds"),  # a distance: less is more
        (said("better", "b", "a"), {"a": 1.0, "b": 2.0}, 0.1, "does not hold"),
        (said("better", "a", "b"), {"a": 1.0, "b": 2.0}, 0.8, "not resolvable here"),
        (said("best", "a"), {"a": 1.0, "b": 2.0, "c": 3.0}, 0.1, "holds"),
        (said("best", "b"), {"a": 1.0, "b": 2.0, "c": 3.0}, 0.1, "does not hold"),
        (said("best", "a"), {"a": 1.0, "b": 1.1, "c": 3.0}, 0.1, "not resolvable here"),
        (said("order", "a", "b", "c"), {"c": 3.0, "b": 2.0, "a": 1.0}, 0.1, "holds"),
        (said("order", "a", "c", "b"), {"c": 3.0, "b": 2.0, "a": 1.0}, 0.1, "does not hold"),
        (said("monotone", "falling"), {1: 3.0, 2: 2.9, 10: 1.0}, 0.1, "holds"),
        (said("monotone", "falling"), {1: 3.0, 2: 1.0, 10: 2.0}, 0.1, "does not hold"),
        (said("monotone", "rising"), {1: 3.0, 2: 2.9, 10: 1.0}, 0.1, "does not hold"),
        (said("monotone", "rising"), {1: 3.0, 2: 3.0, 10: 3.05}, 0.1, "not resolvable here"),
        (said("optimum", 2, 4), {1: 3.0, 2: 2.0, 3: 1.0, 8: 2.0}, 0.1, "holds"),
        (said("optimum", 2, 4), {1: 0.5, 2: 2.0, 3: 1.0, 8: 2.0}, 0.1, "does not hold"),
        (said("optimum", 2, 4), {1: 1.05, 2: 2.0, 3: 1.0, 8: 2.0}, 0.1, "not resolvable here"),
    ],
)
def test_verdicts(claim: Claim, values: dict, half: float, state: str) -> None:
    found = verdict(claim, runs(values, half), KNOWN)
    assert found.state == state, found.why
    assert found.smallest is not None and found.smallest >= 2**0.5 * half * 0.999
    higher = [sweep_run(-v, half, "eval/acc", k=k) for k, v in values.items()]
    if claim.test != "monotone":  # the same of a score of which more is better
        claim = said(claim.test or "", *claim.values, score="eval/acc")
        assert verdict(claim, higher, KNOWN).state == state


def test_other_settings_are_held_or_averaged() -> None:
    found = [*runs({"a": 1.0, "b": 2.0}, x=1), *runs({"a": 2.0, "b": 1.8}, x=2)]
    both = verdict(said("better", "a", "b"), found, KNOWN)
    assert both.state == "holds" and "0.40 (0.30 to 0.50)" in both.why
    assert verdict(said("better", "a", "b", x=2), found, KNOWN).state == "does not hold"
    lone = [*runs({"a": 1.0}, x=1), *runs({"b": 2.0}, x=2)]
    assert verdict(said("better", "a", "b"), lone, KNOWN).state == "not measured"


def test_accuracies_are_paired_by_prompt() -> None:
    """The same two points more on shared prompts can be seen; on other prompts they cannot."""
    claim = said("better", "a", "b", score="eval/scene_accuracy")
    right = np.arange(400) < 340
    a = sweep_run(0.87, 0.035, "eval/scene_accuracy", k="a")
    b = sweep_run(0.85, 0.035, "eval/scene_accuracy", k="b")
    assert verdict(claim, [a, b], METRICS).state == "not resolvable here"
    a.right["eval"] = {(i,): bool(ok) or 340 <= i < 348 for i, ok in enumerate(right)}
    b.right["eval"] = {(i,): bool(ok) for i, ok in enumerate(right)}
    assert verdict(claim, [a, b], METRICS).state == "holds"


def test_what_was_not_run_is_said() -> None:
    assert verdict(said("better", "a", "c"), runs({"a": 1.0, "b": 2.0}), KNOWN).why == (
        "no run with k = c"
    )
    assert verdict(said("better", "a", "b"), [], KNOWN).state == "not measured"
    assert verdict(Claim("x", "y", "paper"), [], KNOWN).state == "not measured"


def test_every_claim_can_be_tested_on_its_sweep() -> None:
    claims = [claim for claim in all_published().claims if claim.test]
    assert len(claims) >= 20
    for claim in claims:
        forms = read_sweep(ROOT / "sweeps" / f"{claim.sweep}.yaml").forms
        points = {name: [text_of(v) for v in listed(form) or []] for name, form in forms.items()}
        values = [] if claim.test == "monotone" else claim.values
        assert {text_of(v) for v in values} <= {*points[claim.setting or ""]}, claim.claim
        assert all(text_of(v) in points[k] for k, v in claim.where.items()), claim.claim
        taken = scan_value(claim.score or "")
        name = (taken[0] if taken else claim.score or "").rpartition("/")[2]
        assert METRICS[name].better or claim.test == "monotone", claim.score


def test_wrong_claims_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for text, message in [
        ("{test: nicer, sweep: a, score: b, setting: c}", "the test nicer"),
        ("{test: better, sweep: a}", "has a test and no sweep, score or setting"),
        ("{test: better, sweep: a, score: b, setting: c, values: [1]}", "needs 2 values"),
        ("{test: monotone, sweep: a, score: b, setting: c, values: [up]}", "rising or falling"),
        ("{claim: dogs are better}", "'dogs are better' needs a test, or a reason"),
    ]:
        path.write_text(f"claims: [{text}]")
        with pytest.raises(ValueError, match=message):
            load_published(path)

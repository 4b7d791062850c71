"""What papers claim, tested on the runs of a sweep: it holds, does not hold, or cannot be told."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from eval.interval import Score
from eval.metric import Metric
from experiments.agent import text_of
from experiments.grid import SweepRun
from experiments.report.published import Claim
from experiments.report.repeated import compared, over_seeds
from experiments.report.scores import metric_of, notation, scan_value

State = Literal["holds", "does not hold", "not resolvable here", "not measured"]


@dataclass(frozen=True)
class Verdict:
    """What runs say of a claim."""

    state: State
    why: str
    """The comparisons that decide, with their 95 % intervals."""
    smallest: float | None = None
    """The smallest difference that these runs could have shown."""


@dataclass(frozen=True)
class Comparison:
    """By how much one value of a setting is better than another one."""

    better: Any
    worse: Any
    score: Score
    """The difference, above 0 where `better` is."""

    @property
    def sign(self) -> int:
        """1: it is better; -1: it is worse; 0: the interval holds both."""
        return (self.score["low"] > 0) - (self.score["high"] < 0)

    def __str__(self) -> str:
        return f"{text_of(self.better)} against {text_of(self.worse)}: {notation(self.score)}"


def verdict(claim: Claim, runs: Sequence[SweepRun], metrics: Mapping[str, Metric]) -> Verdict:
    """Test a claim.

    Runs that differ in other settings alone are compared pair by pair and the differences are
    averaged, each as `compared` gives it. A claim holds where all that it says lies outside of
    chance, does not where the opposite of a part of it does.

    Args:
        claim: what is said.
        runs: those of its sweep, done or not.
        metrics: which way a score is better.
    """
    if claim.test is None or claim.score is None or claim.setting is None:
        return Verdict("not measured", claim.reason)
    found = [
        run
        for run in over_seeds(runs)
        if claim.score in run.scores
        and claim.setting in run.settings
        and all(text_of(run.settings.get(k)) == text_of(v) for k, v in claim.where.items())
    ]
    if not any(run.scores for run in runs):
        return Verdict(
            "not measured", f"run: python -m experiments.sweep sweeps/{claim.sweep}.yaml"
        )
    there = list(dict.fromkeys(text_of(run.settings[claim.setting]) for run in found))
    wanted = [text_of(value) for value in claim.values]
    named = wanted if claim.test in ("better", "best", "order") else []
    missing = [value for value in named if value not in there]
    if missing or len(there) < 2:
        values = " or ".join(missing) or "two values"
        return Verdict("not measured", f"no run with {claim.setting} = {values}")
    taken = scan_value(claim.score)
    metric = metric_of(taken[0] if taken else claim.score, metrics)
    sign = {"higher": 1, "lower": -1}.get(metric.better, 1)
    groups = {
        value: [run for run in found if text_of(run.settings[claim.setting]) == value]
        for value in there
    }
    if claim.test == "monotone":
        sign = 1 if claim.values == ["rising"] else -1
    return _TESTS[claim.test](wanted, _Compare(groups, claim.setting, claim.score, sign))


@dataclass(frozen=True)
class _Compare:
    groups: dict[str, list[SweepRun]]
    setting: str
    score: str
    sign: int

    def __call__(self, better: str, worse: str) -> Comparison | None:
        """Compare two values; None where no two runs agree in the other settings."""
        halves, values = [], []
        for a in self.groups[better]:
            for b in self.groups[worse]:
                if self._others(a) != self._others(b):
                    continue
                d = compared(a, b, self.score)
                values.append(self.sign * d["value"])
                halves.append((d["high"] - d["low"]) / 2)
        if not values:
            return None
        mean = sum(values) / len(values)
        half = math.sqrt(sum(h * h for h in halves)) / len(halves)
        score = {"value": mean, "low": mean - half, "high": mean + half, "n": len(values)}
        return Comparison(better, worse, score)

    def _others(self, run: SweepRun) -> dict[str, str]:
        return {k: text_of(v) for k, v in run.settings.items() if k != self.setting}

    def ranked(self) -> list[str]:
        """Return the values of the setting from the best mean to the worst."""

        def mean(value: str) -> float:
            scores = [run.scores[self.score]["value"] for run in self.groups[value]]
            return self.sign * sum(scores) / len(scores)

        return sorted(self.groups, key=mean, reverse=True)


def _decided(comparisons: Sequence[Comparison | None], all_needed: bool = True) -> Verdict:
    """Decide by comparisons each of which the claim says to be above 0."""
    made = [c for c in comparisons if c is not None]
    if not made:
        return Verdict("not measured", "no two runs differ in this setting alone")
    why = "; ".join(map(str, made))
    smallest = max((c.score["high"] - c.score["low"]) / 2 for c in made)
    signs = [c.sign for c in made]
    if -1 in signs:
        return Verdict("does not hold", why, smallest)
    holds = all(s == 1 for s in signs) if all_needed else 1 in signs
    return Verdict("holds" if holds else "not resolvable here", why, smallest)


def _better(values: Sequence[str], compare: _Compare) -> Verdict:
    return _decided([compare(values[0], values[1])])


def _best(values: Sequence[str], compare: _Compare) -> Verdict:
    rivals = [value for value in compare.ranked() if value != values[0]]
    return _decided([compare(values[0], rival) for rival in rivals])


def _order(values: Sequence[str], compare: _Compare) -> Verdict:
    return _decided([compare(better, worse) for better, worse in pairwise(values)])


def _monotone(values: Sequence[str], compare: _Compare) -> Verdict:
    """Holds where no step goes the other way and the whole way is outside of chance."""
    rising = sorted(compare.groups, key=float)
    steps = [compare(b, a) for a, b in pairwise(rising)]
    against = [c for c in steps if c is not None and c.sign == -1]
    return _decided(against or [compare(rising[-1], rising[0])])


def _optimum(values: Sequence[str], compare: _Compare) -> Verdict:
    """Holds where the best value between the two is better than the best outside on each side."""
    low, high = sorted(map(float, values))
    ranked = compare.ranked()
    inside = [v for v in ranked if low <= float(v) <= high]
    if not inside:
        return Verdict("not measured", f"no run with {compare.setting} from {low:g} to {high:g}")
    sides = [
        [v for v in ranked if float(v) < low],
        [v for v in ranked if float(v) > high],
    ]
    return _decided([compare(inside[0], side[0]) for side in sides if side])


_TESTS = {
    "better": _better,
    "best": _best,
    "order": _order,
    "monotone": _monotone,
    "optimum": _optimum,
}

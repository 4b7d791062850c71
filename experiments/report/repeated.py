"""Runs of a sweep that repeat a point with other seeds, and runs that share their prompts."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.stats import t as student

from eval.interval import Score, Z
from experiments.agent import text_of
from experiments.grid import SEEDS, SweepRun

PAIRED = ("eval/scene_accuracy", "eval/digit_accuracy")  # shares of prompts that are right


def over_seeds(runs: Sequence[SweepRun]) -> list[SweepRun]:
    """Put the runs of a sweep that differ in seeds alone together; others stay as they are.

    A score over K seeds is its mean with Student's 95 % interval: mean +- t(K - 1) s / sqrt(K). It
    holds what training and sampling add, which the interval of one run leaves out.
    """
    groups: dict[tuple[str, ...], list[SweepRun]] = defaultdict(list)
    for run in runs:
        point = tuple(f"{k}={text_of(v)}" for k, v in run.settings.items() if k not in SEEDS)
        groups[point].append(run)
    if len(groups) == len(runs) or len(groups) == 1:  # no seeds, or nothing but seeds
        return list(runs)
    return [_together(group) for group in groups.values()]


def _together(group: Sequence[SweepRun]) -> SweepRun:
    first = group[0]
    done = [run for run in group if run.scores]
    names = [n for n in (done[0].scores if done else {}) if all(n in r.scores for r in done)]
    return replace(
        first,
        settings={k: v for k, v in first.settings.items() if k not in SEEDS},
        scores={name: mean_of([run.scores[name] for run in done]) for name in names},
        error=next((run.error for run in group if run.error), None),
        right={
            prefix: {
                (run.repeat, *key): ok
                for run in group
                for key, ok in run.right.get(prefix, {}).items()
            }
            for prefix in dict.fromkeys(p for run in group for p in run.right)
        },
    )


def mean_of(scores: Sequence[Score]) -> Score:
    """Return the mean of a score over seeds; of one seed the score itself."""
    if len(scores) == 1:
        return dict(scores[0])
    values = np.array([score["value"] for score in scores], float)  # [K]
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    mean = float(values.mean())
    n = sum(score.get("n") or 0 for score in scores)
    return {
        **scores[0],
        "value": mean,
        "low": mean - float(half),
        "high": mean + float(half),
        "n": n,
        "seeds": len(values),
    }


def compared(run: SweepRun, base: SweepRun, name: str) -> Score:
    """Return by how much a score of a run is above that of another one, with its 95 % interval.

    An accuracy is compared prompt by prompt where these are shared. Else two scores a, b with half
    intervals h, those without one exact, have a - b +- sqrt(h_a^2 + h_b^2).
    """
    paired = difference(run, base) if name in PAIRED else None
    if paired is not None:
        return paired
    pair = run.scores[name], base.scores[name]
    value = pair[0]["value"] - pair[1]["value"]
    half = math.hypot(
        *((s["high"] - s["low"]) / 2 if s.get("low") is not None else 0.0 for s in pair)
    )
    return {"value": value, "low": value - half, "high": value + half}


def difference(run: SweepRun, base: SweepRun) -> Score | None:
    """Return by how much more of the shared prompts a run has right than another one.

    Prompts and seeds are paired, so what both have right or both wrong adds no noise (McNemar): the
    mean of d in {-1, 0, 1}, averaged over the seeds of a prompt, +- 1.96 s / sqrt(n).

    Returns:
        The difference with its 95 % interval; None where no prompt is shared.
    """
    ours, theirs = run.right.get("eval", {}), base.right.get("eval", {})
    shared = ours.keys() & theirs.keys() if _asked(run) == _asked(base) else set()
    if not shared:
        return None
    of_prompt: dict[int, list[int]] = defaultdict(list)
    for key in shared:
        of_prompt[key[-1]].append(ours[key] - theirs[key])
    found = np.array([np.mean(d) for d in of_prompt.values()])  # [prompts]
    mean, n = float(found.mean()), len(found)
    half = Z * float(found.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return {"value": mean, "low": mean - half, "high": mean + half, "n": n}


def _asked(run: SweepRun) -> str | None:
    """Return the key of the captions that were asked."""
    sample = run.plan.samples.get("eval")
    return None if sample is None else sample.captions.key

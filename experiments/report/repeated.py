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
        right={(run.repeat, *key): ok for run in group for key, ok in run.right.items()},
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


def difference(run: SweepRun, base: SweepRun) -> Score | None:
    """Return by how much more of the shared prompts a run has right than another one.

    Prompts and seeds are paired, so what both have right or both wrong adds no noise (McNemar): the
    mean of d in {-1, 0, 1}, averaged over the seeds of a prompt, +- 1.96 s / sqrt(n).

    Returns:
        The difference with its 95 % interval; None where no prompt is shared.
    """
    shared = run.right.keys() & base.right.keys()
    if not shared:
        return None
    of_prompt: dict[int, list[int]] = defaultdict(list)
    for key in shared:
        of_prompt[key[-1]].append(run.right[key] - base.right[key])
    found = np.array([np.mean(d) for d in of_prompt.values()])  # [prompts]
    mean, n = float(found.mean()), len(found)
    half = Z * float(found.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return {"value": mean, "low": mean - half, "high": mean + half, "n": n}

"""Samplers of the same checkpoints beside the papers' own loops, at equal numbers of calls."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from eval.interval import Score
from experiments.agent import text_of
from experiments.grid import SEEDS, SweepRun
from experiments.report import charts
from experiments.report.repeated import difference, over_seeds
from experiments.report.scores import notation
from experiments.settings import resolved

NAME, STEPS, GAMMA = "sampling.sampler.name", "sampling.steps", "sampling.sampler.gamma"
ACCURACY, CALLS = "eval/scene_accuracy", "eval/network_calls"
OWN = "own"
SHOWN = {
    CALLS: "calls",
    ACCURACY: "accuracy",
    "eval/scene_atoms": "atoms",
    "eval/scene_coverage": "coverage",
    "eval/fd_scenes": "distance",
}


class Sampled(NamedTuple):
    """A sampler at one budget, at the best of the settings that were tried."""

    paper: str
    sampler: str
    settings: str
    """Those that were chosen among, such as the temperature."""
    steps: int
    run: SweepRun
    over_own: Score | None
    """By how much more of the prompts it has right than the paper's own loop at as many steps."""

    @property
    def told(self) -> str:
        """How it compares with the paper's own loop."""
        if self.over_own is None:
            return ""
        low, high = self.over_own["low"], self.over_own["high"]
        return "better" if low > 0 else "worse" if high < 0 else "not distinguishable"


def beside_own(sweeps: Sequence[Sequence[SweepRun]]) -> list[Sampled]:
    """Return every sampler at every budget, each at its best setting, papers' own loops first.

    A budget is a number of steps, or, of samplers that stop by themselves, a bound gamma.

    A run of a paper's own loop is one that varies nothing but the steps. Where repetitions with
    other seeds measured what one seed had chosen, they alone count.

    Args:
        sweeps: runs of sweeps, of which some vary `sampling.sampler.name` or fix it.
    """
    groups: dict[tuple[str, str, int, Any], list[SweepRun]] = defaultdict(list)
    for runs in sweeps:
        for run in over_seeds(runs):
            sampler = _words(run).get(NAME, OWN)
            plain = run.settings.keys() - SEEDS == {STEPS}
            if ACCURACY in run.scores and (sampler != OWN or plain):
                steps = run.settings.get(STEPS) or resolved(run.config)["sampling"]["steps"]
                groups[run.paper, sampler, steps, run.settings.get(GAMMA)].append(run)
    papers = {paper for paper, sampler, *_ in groups if sampler != OWN}
    best = {key: max(runs, key=_rank) for key, runs in groups.items() if key[0] in papers}
    found = []
    for (paper, sampler, steps, _), run in best.items():
        own = best.get((paper, OWN, steps, None))
        over = difference(run, own) if own is not None and sampler != OWN else None
        chosen = {k: v for k, v in run.settings.items() if k not in {NAME, STEPS, *SEEDS}}
        settings = " ".join(f"{k.rpartition('.')[2]}={text_of(v)}" for k, v in chosen.items())
        found.append(Sampled(paper, sampler, settings, steps, run, over))
    return sorted(found, key=lambda row: (row.paper, row.steps, row.sampler != OWN))


def _words(run: SweepRun) -> dict[str, str]:
    """Return the settings of a run's command line; of one that is given twice, the last."""
    pairs = (word.removeprefix("--").partition("=") for word in run.argv)
    return {name: value for name, _, value in pairs}


def _rank(run: SweepRun) -> tuple[int, float]:
    score = run.scores[ACCURACY]
    return score.get("seeds", 1), score["value"]


def tables(rows: Sequence[Sampled]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Return (heads, rows) of a table for every paper."""
    heads = ["steps", "sampler", *SHOWN.values(), "against own, points", "so"]
    made: dict[str, tuple[list[str], list[list[str]]]] = {}
    for row in rows:
        over = row.over_own
        points = {k: 100 * over[k] for k in ("value", "low", "high")} if over else None
        scores = [_cell(name, row.run.scores.get(name)) for name in SHOWN]
        cells = [str(row.steps), f"{row.sampler} {row.settings}".strip(), *scores]
        _, lines = made.setdefault(row.paper, (heads, []))
        lines.append([*cells, notation(points), row.told])
    return made


def _cell(name: str, score: Score | None) -> str:
    """Write a score; of calls, which most samplers make equally many for all pictures, the mean."""
    return f"{score['value']:.3g}" if name == CALLS and score else notation(score)


def frontiers(rows: Sequence[Sampled]) -> dict[str, Figure]:
    """Draw accuracy against calls for every paper: {paper: chart}."""
    curves: dict[str, dict[str, list[charts.Value]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        scores: Mapping[str, Score] = row.run.scores
        calls = scores[CALLS]["value"] if CALLS in scores else row.steps
        # intervals of so many curves would hide each other; the table has them, and pairs
        value = charts.Value(calls, scores[ACCURACY]["value"])
        curves[row.paper][row.sampler].append(value)
    for by_sampler in curves.values():
        for values in by_sampler.values():
            values.sort(key=lambda value: value.x)
    return {
        paper: charts.lines(by_sampler, across="network calls per picture", up="scene_accuracy")
        for paper, by_sampler in curves.items()
    }

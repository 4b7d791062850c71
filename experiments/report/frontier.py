"""Papers beside each other in one sweep: who is best at a budget of calls, and what more buys."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from eval.scorers import METRICS
from experiments.agent import text_of
from experiments.grid import Sweep, SweepRun, short_names
from experiments.papers.registry import PAPERS
from experiments.report import charts
from experiments.report.repeated import compared
from experiments.report.scores import ScoreTable, metric_of, notation

BUDGET = "sampling.steps"
SCORES = ("eval/scene_accuracy", "eval/partial/scene_coverage", "eval/fd_scenes")
COSTS = {
    "eval/network_calls": "network calls per picture",
    "eval/seconds": "seconds per picture, on the machine that drew it",
    "eval/parameters": "trained parameters",
}
KINDS = 6  # values of the other settings, each with a chart of its own; more have none

Methods = Mapping[str, Sequence[SweepRun]]


def are_several(runs: Sequence[SweepRun]) -> bool:
    """Say whether runs are of several papers."""
    return len({run.paper for run in runs}) > 1


def methods(runs: Sequence[SweepRun]) -> dict[str, list[SweepRun]]:
    """Return the runs by paper, with what a run draws of another paper as that one's.

    Improved VQ-Diffusion draws VQ-Diffusion from the same checkpoint: its pictures are scored as
    vq_diffusion/..., and many runs share them. They are one run here, without the settings that
    make no difference to them.
    """
    found: dict[str, list[SweepRun]] = {}
    beside: dict[tuple[str, str], list[SweepRun]] = {}
    for run in runs:
        found.setdefault(run.paper, []).append(run)
        for prefix, sample in run.plan.samples.items():
            if prefix in PAPERS:
                beside.setdefault((prefix, sample.key), []).append(run)
    for (paper, _), group in beside.items():
        done = next((run for run in group if run.scores), group[0])
        scores = {
            name.replace(f"{paper}/", "eval/", 1): score
            for name, score in done.scores.items()
            if name.startswith(f"{paper}/")
        }
        # what runs with the same pictures differ in is nothing to these pictures
        same = [other for (name, _), other in beside.items() if name == paper]
        settings = {
            name: value
            for name, value in done.settings.items()
            if all(run.settings[name] == g[0].settings[name] for g in same for run in g)
        }
        alone = replace(
            done,
            paper=paper,
            settings={**settings, "paper": paper},
            scores=scores,
            right={"eval": done.right.get(paper, {})},
        )
        found.setdefault(paper, []).append(alone)
    return found


def winners(sweep: Sweep, runs: Sequence[SweepRun]) -> list[ScoreTable]:
    """Tabulate every budget: each paper at its best, and the winner, if there is one.

    A paper wins a budget where its best run is better than the best run of every other paper, each
    time by a difference whose 95 % interval does not hold 0, on the same prompts where there are
    such. A paper's best is chosen by the score itself. No table without two papers and a metric.
    """
    found, metric = methods(runs), sweep.metric
    if not are_several(runs) or metric is None:
        return []
    sign, rows = _sign(sweep, metric), []
    for budget in budgets(runs):
        best = {name: _best(own, metric, budget, sign) for name, own in found.items()}
        cells = [_cell(run, metric, budget) for run in best.values()]
        there = {name: run for name, run in best.items() if run is not None}
        winner, why = _winner(there, metric, sign)
        if winner and len(there) < len(best):
            winner += f"\nof {len(there)} that were run"
        rows.append([text_of(budget), winner, why, *cells])
    heads = ["network calls", "winner", "by how much", *found]
    return [ScoreTable(f"Who is best at a budget: {metric.removeprefix('eval/')}", heads, rows)]


def _winner(best: Mapping[str, SweepRun], metric: str, sign: int) -> tuple[str, str]:
    """Name the winner among the best runs of the papers, or that there is none, and say why."""
    ranked = sorted(best, key=lambda name: sign * best[name].scores[metric]["value"], reverse=True)
    if len(ranked) < 2:
        return "", ""
    first, *rivals = ranked
    gaps = {name: compared(best[first], best[name], metric) for name in rivals}
    # whether the nearer end of the interval is on the winner's side
    ends = {name: gap["low"] if sign > 0 else -gap["high"] for name, gap in gaps.items()}
    level = [name for name in rivals if ends[name] <= 0]
    told = level or [min(rivals, key=lambda name: ends[name])]
    why = "; ".join(f"{first} - {name}: {notation(gaps[name])}" for name in told)
    return "no winner" if level else first, why


def _cell(run: SweepRun | None, metric: str, budget: object) -> str:
    """Write a paper's best score with the settings that gave it, and the calls if they differ."""
    if run is None:
        return ""
    told = _label(run)
    calls = run.scores.get("eval/network_calls")
    if calls is not None and calls["value"] != budget:
        told = ", ".join(filter(None, [told, f"{calls['value']:.1f} calls"]))
    return "\n".join(filter(None, [notation(run.scores[metric]), told]))


def frontiers(sweep: Sweep, runs: Sequence[SweepRun]) -> dict[str, Figure]:
    """Draw scores against costs, a line per paper: at its best, and at each setting held fixed.

    Returns:
        {name of the PNG: chart}.
    """
    found, figures = methods(runs), dict[str, Figure]()
    scores = list(dict.fromkeys(filter(None, [sweep.metric, *SCORES])))
    for score in scores:
        sign = _sign(sweep, score)
        best = {
            name: [run for b in budgets(own) if (run := _best(own, score, b, sign)) is not None]
            for name, own in found.items()
        }
        for cost in COSTS:
            _draw(figures, best, score, cost, sign)
    kinds = _kinds(found)
    for kind in kinds if 1 < len(kinds) <= KINDS else ():
        fixed = {
            name: [run for run in own if _others(run).items() <= kind.items()]
            for name, own in found.items()
        }
        sign = _sign(sweep, scores[0])
        _draw(figures, fixed, scores[0], "eval/network_calls", sign, _text(kind))
    return figures


def _draw(
    figures: dict[str, Figure], found: Methods, score: str, cost: str, sign: int, kind: str = ""
) -> None:
    """Add a chart of a score against a cost, where runs know both; of equal costs the best."""
    curves: dict[str, list[charts.Value]] = {}
    for name, own in found.items():
        there = [run for run in own if score in run.scores and cost in run.scores]
        there.sort(key=lambda run: sign * run.scores[score]["value"])
        at = {run.scores[cost]["value"]: run.scores[score] for run in there}  # the last one stays
        if at:
            curves[name] = [charts.value_of(x, at[x]) for x in sorted(at)]
    if not curves:
        return
    short, last = score.removeprefix("eval/"), cost.rpartition("/")[2]
    name = "-".join(filter(None, [short, last, kind])).replace("/", "-").replace(" ", "-")
    figures[f"{name}.png"] = charts.lines(
        curves, across=COSTS[cost], up=short, title=kind or "each at its best setting"
    )


def _best(own: Sequence[SweepRun], score: str, budget: object, sign: int) -> SweepRun | None:
    """Return the best run at a budget, the first of equal ones.

    Where repetitions with other seeds measured what one seed had chosen, they alone count.
    """

    def rank(run: SweepRun) -> tuple[int, float]:
        return run.scores[score].get("seeds", 1), sign * run.scores[score]["value"]

    there = [run for run in own if score in run.scores and _budget(run) == budget]
    return max(there, key=rank, default=None)


def _sign(sweep: Sweep, score: str) -> int:
    """Return 1 where more is better, -1 where less is."""
    if score == sweep.metric:
        return -1 if sweep.minimize else 1
    return -1 if metric_of(score, METRICS).better == "lower" else 1


def budgets(runs: Iterable[SweepRun]) -> list[object]:
    """Return the budgets of a sweep in its order; one that names none has the budget "any"."""
    return list(dict.fromkeys(_budget(run) for run in runs))


def _budget(run: SweepRun) -> object:
    return run.settings.get(BUDGET, "any")


def _others(run: SweepRun) -> dict[str, str]:
    """Return the settings besides paper and budget."""
    return {k: text_of(v) for k, v in run.settings.items() if k not in ("paper", BUDGET)}


def _kinds(found: Methods) -> list[dict[str, str]]:
    """Return the values of the other settings that runs have, each once, the fullest ones alone."""
    kinds = [_others(run) for own in found.values() for run in own]
    most = max(map(len, kinds))
    return [dict(k) for k in dict.fromkeys(tuple(k.items()) for k in kinds if len(k) == most)]


def _label(run: SweepRun) -> str:
    return _text(_others(run))


def _text(settings: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in short_names(settings).items())

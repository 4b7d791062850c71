"""The tables of a sweep: scores of every run with intervals, published numbers beside them."""

import csv
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from data.files import write_text
from eval.interval import Score
from eval.scorers import METRICS
from experiments.agent import text_of
from experiments.grid import Sweep, SweepRun, short_names
from experiments.report import charts
from experiments.report.claims import verdict
from experiments.report.document import boxes, code, document, html_table, paragraphs, section
from experiments.report.frontier import are_several, frontiers, winners
from experiments.report.published import Published
from experiments.report.repeated import difference, over_seeds
from experiments.report.scores import ScoreTable, main_scores, notation, scans


class Summary(NamedTuple):
    """What there is to read of a sweep."""

    tables: list[ScoreTable]
    notes: list[str]
    """The best run, what is equal in all, and what failed."""
    sources: list[str]
    """Where the published numbers come from."""


def summarize(sweep: Sweep, runs: Sequence[SweepRun], published: Published) -> Summary:
    """Collect the tables of a sweep and the lines below them.

    Args:
        sweep: whose runs.
        runs: all of them, done or not.
        published: what was published of the same settings.
    """
    runs = over_seeds(runs)
    names, same = columns(sweep, runs)
    tables = [*winners(sweep, runs), _main_table(runs, names, published)]
    for (score, what), curves in _scanned(runs).items():
        xs = sorted({x for curve in curves.values() for x in curve})
        rows = [[label, *(notation(curve.get(x)) for x in xs)] for label, curve in curves.items()]
        heads = [_short(score), *(f"{x:g}" for x in xs)]
        tables.append(ScoreTable(f"{_short(score)} against {what}", heads, rows))
    tables += _paired(runs) + _claims(runs, published)
    notes = [
        *best_line(sweep, runs),
        *(f"equal in all runs: {_short(n)} {notation(score)}" for n, score in same.items()),
        *(f"failed: {p.label}: {p.error}" for p in runs if p.error),
    ]
    return Summary(tables, notes, list(published.provenance()))


def columns(sweep: Sweep, runs: Sequence[SweepRun]) -> tuple[list[str], dict[str, Score]]:
    """Return the scores that differ between runs, the metric first, and those that do not."""
    done = [p for p in runs if p.scores]
    names = list(dict.fromkeys(n for p in done for n in main_scores(p.scores)))
    names.sort(key=lambda name: name != sweep.metric)
    same = {
        name: done[0].scores[name]
        for name in names
        if len(done) > 1
        and name != sweep.metric
        and all(name in p.scores and p.scores[name] == done[0].scores.get(name) for p in done)
    }
    return [name for name in names if name not in same], same


def _main_table(runs: Sequence[SweepRun], names: Sequence[str], published: Published) -> ScoreTable:
    """A row per run, or a column per run where these are fewer than the scores."""
    settings = list(runs[0].settings) if runs else []
    varied = [
        [short, *(text_of(p.settings[name]) for p in runs)]
        for name, short in zip(settings, short_names(dict.fromkeys(settings)), strict=True)
    ]
    given: list[tuple[str | None, list[str]]] = []  # (score that was measured too, column)
    for table in published.tables.values():
        if table.setting in settings and table.across in settings:
            own = [(text_of(p.settings[k]) for k in (table.setting, table.across)) for p in runs]
            numbers = [table.rows.get(row, {}).get(column) for row, column in own]
            (score,) = set(table.columns.values())
            given.append((score, ["published", *("" if n is None else f"{n:g}" for n in numbers)]))
        elif table.setting in settings:
            rows = [table.rows.get(text_of(p.settings[table.setting]), {}) for p in runs]
            for name, score in table.columns.items():
                cells = [f"{row[name]:g}" if name in row else "" for row in rows]
                given.append((score, [f"{name}, published", *cells]))
    scored = []
    for name in names:
        cells = ["failed" if p.error else notation(p.scores.get(name)) for p in runs]
        scored += [[_short(name), *cells], *(column for score, column in given if score == name)]
    scored += [column for score, column in given if score not in names]
    if len(runs) < len(scored):
        across = [", ".join(cells) for cells in zip(*varied, strict=True)] or ["score", ""]
        return ScoreTable("Scores", across, scored)
    heads, *lines = [list(cells) for cells in zip(*varied, *scored, strict=True)] or [[]]
    return ScoreTable("Scores", heads, lines)


def _scanned(runs: Sequence[SweepRun]) -> dict[tuple[str, str], dict[str, dict[float, Score]]]:
    """Return scores at several values of something: (score, what) -> run -> value -> score."""
    found: dict[tuple[str, str], dict[str, dict[float, Score]]] = {}
    for run in runs:
        for key, names in scans(run.scores).items():
            curve = {x: run.scores[name] for x, name in names.items()}
            found.setdefault(key, {})[run.label] = curve
    return found


def _paired(runs: Sequence[SweepRun]) -> list[ScoreTable]:
    """Compare every run of a paper with the first one, prompt by prompt, where that can be."""
    if are_several(runs):
        return []
    found = [(run.label, difference(run, runs[0])) for run in runs[1:]] if runs else []
    rows = [[label, notation(d), str(d["n"])] for label, d in found if d is not None]
    title = f"Right more often than {runs[0].label}, on the same prompts" if rows else ""
    return [ScoreTable(title, ["run", "difference", "prompts"], rows)] if rows else []


def _claims(runs: Sequence[SweepRun], published: Published) -> list[ScoreTable]:
    """Say of every claim about these runs whether it holds."""
    tested = [c for c in published.claims if c.test is not None]
    rows = []
    for claim in tested:
        found = verdict(claim, runs, METRICS)
        smallest = "" if found.smallest is None else f"{found.smallest:.2g}"
        rows.append([claim.claim, claim.source, found.state, found.why, smallest])
    heads = ["claim", "source", "verdict", "here", "smallest difference that could be seen"]
    return [ScoreTable("What was claimed", heads, rows)] if rows and len(runs) > 1 else []


def best_line(sweep: Sweep, runs: Sequence[SweepRun]) -> list[str]:
    """Name the run with the best metric, the first of equal ones, and how many may be as good.

    Those may be whose 95 % intervals overlap with its interval; where all do, it is a tie. No line
    without two runs that are scored.
    """
    scored = [(p.label, p.scores[sweep.metric]) for p in runs if sweep.metric in p.scores]
    if len(scored) < 2:
        return []
    choose = min if sweep.minimize else max
    label, score = choose(scored, key=lambda pair: pair[1]["value"])
    (low, high), others = _interval(score), len(scored) - 1
    ends = [_interval(other) for _, other in scored]
    overlap = sum(lowest <= high and low <= highest for lowest, highest in ends) - 1
    line = f"best {sweep.metric}: {label}: {notation(score)}"
    if overlap == others:
        return [f"{line}; but a tie: the intervals of all others overlap with it"]
    return [f"{line}; {overlap} of the other {others} overlap with it" if overlap else line]


def write_sweep(
    sweep: Sweep, runs: Sequence[SweepRun], out: Path, command: str, published: Published
) -> list[Path]:
    """Write table.csv, table.html and the charts; returns their paths."""
    figures = draw(sweep, runs)
    write_text(out / "table.csv", as_csv(runs))
    write_text(out / "table.html", as_html(sweep, runs, command, figures, published))
    for name, figure in figures.items():
        charts.save(out / name, figure)
    return [out / name for name in ("table.csv", "table.html", *figures)]


def as_csv(runs: Sequence[SweepRun]) -> str:
    """Return one line per run: settings, every score with interval and n, and the run folder."""
    settings = list(runs[0].settings) if runs else []
    names = list(dict.fromkeys(name for p in runs for name in p.scores))
    heads = [*settings, *(f"{n}{end}" for n in names for end in ("", " low", " high", " n"))]
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow([*heads, "run", "error"])
    for run in runs:
        row: list[Any] = [text_of(run.settings[s]) for s in settings]
        for name in names:
            score = run.scores.get(name, {})
            row += [score.get(key) for key in ("value", "low", "high", "n")]
        writer.writerow([*row, run.out, run.error])
    return lines.getvalue()


def as_html(
    sweep: Sweep,
    runs: Sequence[SweepRun],
    command: str,
    figures: Mapping[str, Figure],
    published: Published,
) -> str:
    """Return the page of a sweep: one self-contained file."""
    tables, notes, sources = summarize(sweep, runs, published)
    drawn = [charts.chart_tag(figure, Path(name).stem) for name, figure in figures.items()]
    main, *others = [
        section(t.title, html_table(t.heads, t.rows), "With the 95 % intervals.") for t in tables
    ]
    return document(
        f"Sweep {sweep.name}",
        [
            f"<h1>{escape(sweep.name)}</h1><p class=muted>{len(runs)} runs</p>",
            paragraphs(notes),
            main,
            section("Charts", boxes("charts", drawn)),
            *others,
            section("What was published", paragraphs(sources)),
            section("Run it again", code(command)),
        ],
    )


def draw(sweep: Sweep, runs: Sequence[SweepRun]) -> dict[str, Figure]:
    """Draw the sweep's metric over its settings, and every score that was scanned.

    Returns:
        {name of the PNG: chart}.
    """
    runs = over_seeds(runs)
    figures: dict[str, Figure] = {}
    names, _ = columns(sweep, runs)
    metric = names[0] if names else ""
    scored = [(p, p.scores[metric]) for p in runs if metric in p.scores]
    settings = list(short_names(scored[0][0].settings)) if scored else []
    if are_several(runs):
        figures |= frontiers(sweep, runs)
    elif len(settings) == 2:
        across, up = settings
        cells = {}
        for run, score in scored:
            x, y = map(text_of, run.settings.values())
            cells[x, y] = score["value"]
        figures["picture.png"] = charts.heatmap(cells, across=across, up=up, title=_short(metric))
    elif settings:
        curves: dict[str, list[charts.Value]] = {}
        for run, score in scored:
            *others, (last, x) = short_names(run.settings).items()
            label = " ".join(f"{name}={text_of(value)}" for name, value in others)
            curves.setdefault(label, []).append(charts.value_of(x, score))
        figures["picture.png"] = charts.lines(curves, across=last, up=_short(metric))
    for (name, what), found in _scanned(runs).items():
        curves = {
            label: [charts.value_of(x, score) for x, score in curve.items()]
            for label, curve in found.items()
        }
        path = f"{name.rpartition('/')[2]}-{what}.png"
        figures[path] = charts.lines(curves, across=what, up=_short(name))
    return figures


def _interval(score: Score) -> tuple[float, float]:
    """Return the interval of a score; the value twice where it has none."""
    low, high = score.get("low"), score.get("high")
    return (score["value"],) * 2 if low is None or high is None else (low, high)


def _short(name: str) -> str:
    return name.removeprefix("eval/")

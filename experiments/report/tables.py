"""The tables of a sweep: scores of every point with intervals, published numbers beside them."""

import csv
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from data.files import write_text
from eval.interval import Score
from experiments.points import Point, Sweep, short_names, text_of
from experiments.report import charts
from experiments.report.document import boxes, code, document, html_table, paragraphs, section
from experiments.report.published import Published
from experiments.report.scores import main_scores, notation, scans


class ScoreTable(NamedTuple):
    """One table in words, for a page and for a terminal."""

    title: str
    heads: list[str]
    rows: list[list[str]]


class Summary(NamedTuple):
    """What there is to read of a sweep."""

    tables: list[ScoreTable]
    notes: list[str]
    """The best point, what is equal in all, and what failed."""
    sources: list[str]
    """Where the published numbers come from."""


def summarize(sweep: Sweep, points: Sequence[Point], published: Published) -> Summary:
    """Collect the tables of a sweep and the lines below them.

    Args:
        sweep: whose points.
        points: all of them, done or not.
        published: what was published of the same settings.
    """
    names, same = columns(sweep, points)
    tables = [_main_table(points, names, published)]
    for (score, what), curves in _scanned(points).items():
        xs = sorted({x for curve in curves.values() for x in curve})
        rows = [[label, *(notation(curve.get(x)) for x in xs)] for label, curve in curves.items()]
        heads = [_short(score), *(f"{x:g}" for x in xs)]
        tables.append(ScoreTable(f"{_short(score)} against {what}", heads, rows))
    notes = [
        *best_line(sweep, points),
        *(f"equal in all points: {_short(n)} {notation(score)}" for n, score in same.items()),
        *(f"failed: {p.label}: {p.error}" for p in points if p.error),
    ]
    return Summary(tables, notes, list(published.provenance()))


def columns(sweep: Sweep, points: Sequence[Point]) -> tuple[list[str], dict[str, Score]]:
    """Return the scores that differ between points, the metric first, and those that do not."""
    done = [p for p in points if p.scores]
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


def _main_table(points: Sequence[Point], names: Sequence[str], published: Published) -> ScoreTable:
    """A row per point, or a column per point where these are fewer than the scores."""
    settings = list(points[0].settings) if points else []
    varied = [
        [short, *(text_of(p.settings[name]) for p in points)]
        for name, short in zip(settings, short_names(dict.fromkeys(settings)), strict=True)
    ]
    given: list[tuple[str | None, list[str]]] = []  # (score that was measured too, column)
    for table in published.tables.values():
        if table.setting in settings:
            rows = [table.rows.get(text_of(p.settings[table.setting]), {}) for p in points]
            for name, score in table.columns.items():
                cells = [f"{row[name]:g}" if name in row else "" for row in rows]
                given.append((score, [f"{name}, published", *cells]))
    scored = []
    for name in names:
        cells = ["failed" if p.error else notation(p.scores.get(name)) for p in points]
        scored += [[_short(name), *cells], *(column for score, column in given if score == name)]
    scored += [column for score, column in given if score not in names]
    if len(points) < len(scored):
        across = [", ".join(cells) for cells in zip(*varied, strict=True)] or ["score", ""]
        return ScoreTable("Scores", across, scored)
    heads, *lines = [list(cells) for cells in zip(*varied, *scored, strict=True)] or [[]]
    return ScoreTable("Scores", heads, lines)


def _scanned(points: Sequence[Point]) -> dict[tuple[str, str], dict[str, dict[float, Score]]]:
    """Return scores at several values of something: (score, what) -> point -> value -> score."""
    found: dict[tuple[str, str], dict[str, dict[float, Score]]] = {}
    for point in points:
        for key, names in scans(point.scores).items():
            curve = {x: point.scores[name] for x, name in names.items()}
            found.setdefault(key, {})[point.label] = curve
    return found


def best_line(sweep: Sweep, points: Sequence[Point]) -> list[str]:
    """Name the point with the best metric, the first of equal ones, and how many may be as good.

    Those may be whose 95 % intervals overlap with its interval; where all do, it is a tie. No line
    without two points that are scored.
    """
    scored = [(p.label, p.scores[sweep.metric]) for p in points if sweep.metric in p.scores]
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
    sweep: Sweep, points: Sequence[Point], out: Path, command: str, published: Published
) -> list[Path]:
    """Write table.csv, table.html and the charts; returns their paths."""
    figures = draw(sweep, points)
    write_text(out / "table.csv", as_csv(points))
    write_text(out / "table.html", as_html(sweep, points, command, figures, published))
    for name, figure in figures.items():
        charts.save(out / name, figure)
    return [out / name for name in ("table.csv", "table.html", *figures)]


def as_csv(points: Sequence[Point]) -> str:
    """Return one line per point: settings, every score with interval and n, and the run folder."""
    settings = list(points[0].settings) if points else []
    names = list(dict.fromkeys(name for p in points for name in p.scores))
    heads = [*settings, *(f"{n}{end}" for n in names for end in ("", " low", " high", " n"))]
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow([*heads, "run", "error"])
    for point in points:
        row: list[Any] = [text_of(point.settings[s]) for s in settings]
        for name in names:
            score = point.scores.get(name, {})
            row += [score.get(key) for key in ("value", "low", "high", "n")]
        writer.writerow([*row, point.out, point.error])
    return lines.getvalue()


def as_html(
    sweep: Sweep,
    points: Sequence[Point],
    command: str,
    figures: Mapping[str, Figure],
    published: Published,
) -> str:
    """Return the page of a sweep: one self-contained file."""
    tables, notes, sources = summarize(sweep, points, published)
    drawn = [charts.chart_tag(figure, Path(name).stem) for name, figure in figures.items()]
    main, *others = [
        section(t.title, html_table(t.heads, t.rows), "With the 95 % intervals.") for t in tables
    ]
    return document(
        f"Sweep {sweep.name}",
        [
            f"<h1>{escape(sweep.name)}</h1><p class=muted>{len(points)} points</p>",
            paragraphs(notes),
            main,
            section("Charts", boxes("charts", drawn)),
            *others,
            section("What was published", paragraphs(sources)),
            section("Run it again", code(command)),
        ],
    )


def draw(sweep: Sweep, points: Sequence[Point]) -> dict[str, Figure]:
    """Draw the sweep's metric over its settings, and every score that was scanned.

    Returns:
        {name of the PNG: chart}.
    """
    figures: dict[str, Figure] = {}
    names, _ = columns(sweep, points)
    metric = names[0] if names else ""
    scored = [(p, p.scores[metric]) for p in points if metric in p.scores]
    settings = list(short_names(scored[0][0].settings)) if scored else []
    if len(settings) == 2:
        across, up = settings
        cells = {}
        for point, score in scored:
            x, y = map(text_of, point.settings.values())
            cells[x, y] = score["value"]
        figures["picture.png"] = charts.heatmap(cells, across=across, up=up, title=_short(metric))
    elif settings:
        curves: dict[str, list[charts.Value]] = {}
        for point, score in scored:
            *others, (last, x) = short_names(point.settings).items()
            label = " ".join(f"{name}={text_of(value)}" for name, value in others)
            curves.setdefault(label, []).append(charts.value_of(x, score))
        figures["picture.png"] = charts.lines(curves, across=last, up=_short(metric))
    for (name, what), found in _scanned(points).items():
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

"""The table of a sweep: a line per point, scores with intervals, published numbers beside them."""

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from experiments import charts
from experiments.points import Point, Sweep, short_names, text_of
from experiments.report import document, html_table, main_scores, picture_tag, scans, section
from experiments.reported import Claim, Table


@dataclass
class Grid:
    """What is shown of a sweep: one line per point."""

    settings: list[str]
    columns: list[str]
    """Scores that differ between points, the metric first."""
    same: dict[str, Mapping[str, Any]]
    """Scores that are equal in all points."""


def make_grid(sweep: Sweep, points: Sequence[Point]) -> Grid:
    """Choose the columns of a sweep's table."""
    done = [p for p in points if p.scores]
    names = list(dict.fromkeys(n for p in done for n in main_scores(p.scores)))
    if sweep.metric in names:
        names = [sweep.metric, *(n for n in names if n != sweep.metric)]
    same: dict[str, Mapping[str, Any]] = {}
    for name in names:
        found = [p.scores.get(name) for p in done]
        if (
            len(done) > 1
            and name != sweep.metric
            and found[0]
            and all(f == found[0] for f in found)
        ):
            same[name] = found[0]
    return Grid(
        list(points[0].settings) if points else [], [n for n in names if n not in same], same
    )


def rows_of(
    grid: Grid, points: Sequence[Point], tables: Sequence[Table]
) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the table: a row per point, or a column where points are few.

    Published numbers stand next to what they belong to.
    """
    beside = {
        score: (table, name)
        for table in tables
        for name, score in table.columns.items()
        if score in grid.columns and table.setting in grid.settings
    }
    lone = [
        (table, name)
        for table in tables
        if table.setting in grid.settings
        for name, score in table.columns.items()
        if score not in grid.columns
    ]
    heads = list(short_names(dict.fromkeys(grid.settings)))
    for column in grid.columns:
        heads.append(column.removeprefix("eval/"))
        if column in beside:
            heads.append(f"{beside[column][1]}, published")
    heads += [f"{name}, published" for _, name in lone]
    rows = []
    for point in points:
        row = [text_of(point.settings[s]) for s in grid.settings]
        for column in grid.columns:
            row.append("failed" if point.error else cell(point.scores.get(column)))
            if column in beside:
                row.append(_published(point, *beside[column]))
        rows.append([*row, *(_published(point, table, name) for table, name in lone)])
    if len(points) < len(heads) - len(grid.settings):  # few points: one column for each
        points_heads = [row[: len(grid.settings)] for row in rows]
        across = [", ".join(names) for names in points_heads]
        down = heads[len(grid.settings) :]
        turned = [
            [name, *(row[i] for row in rows)] for i, name in enumerate(down, len(grid.settings))
        ]
        return [", ".join(heads[: len(grid.settings)]) or "score", *across], turned
    return heads, rows


def _published(point: Point, table: Table, name: str) -> str:
    value = table.rows.get(text_of(point.settings[table.setting or ""]), {}).get(name)
    return "" if value is None else f"{value:g}"


def scan_tables(points: Sequence[Point]) -> dict[tuple[str, str], dict[float, list[str]]]:
    """Return scores at several values of something: (score, what) -> value -> name per point."""
    found: dict[tuple[str, str], dict[float, list[str]]] = {}
    for point in points:
        for key, places in scans(point.scores).items():
            for value, name in places:
                found.setdefault(key, {}).setdefault(value, []).append(name)
    return {key: dict(sorted(rows.items())) for key, rows in found.items()}


def best(sweep: Sweep, points: Sequence[Point]) -> Point | None:
    """Return the point with the best value of the sweep's metric, the first of equal ones."""
    scored = [p for p in points if sweep.metric in p.scores]
    sign = 1 if sweep.minimize else -1
    return min(scored, key=lambda p: sign * p.scores[sweep.metric or ""]["value"], default=None)


def cell(score: Mapping[str, Any] | None) -> str:
    """Return a score with its interval, as a table shows it."""
    if score is None:
        return ""
    value = score["value"]
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    if score.get("low") is None:
        return text
    return f"{text} ({score['low']:.3g} to {score['high']:.3g})"


def scan_rows(
    points: Sequence[Point], score: str, values: Mapping[float, list[str]]
) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of a score at several values: one row per point."""
    done = [p for p in points if p.scores]
    heads = [score.removeprefix("eval/"), *(f"{value:g}" for value in values)]
    rows = []
    for point in done:
        cells = [cell(next((point.scores[n] for n in names if n in point.scores), None))
                 for names in values.values()]  # fmt: skip
        rows.append([point.label, *cells])
    return heads, rows


def provenance(tables: Sequence[Table], claims: Sequence[Claim]) -> Iterator[str]:
    """Say where published numbers come from."""
    for table in tables:
        yield f"published: {table.title}; {table.source}; evidence: {table.evidence}; " + (
            f"{table.protocol}. Another data set and size: compare the order, not the numbers."
        )
    for claim in claims:
        yield f"published: {claim.claim} {claim.source}; evidence: {claim.evidence}"


def write_results(
    sweep: Sweep, points: Sequence[Point], out: Path, command: str,
    tables: Sequence[Table], claims: Sequence[Claim],
) -> list[Path]:  # fmt: skip
    """Write table.csv, the pictures and table.html; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(sweep, points, out)
    _write(out / "table.csv", as_csv(points))
    _write(out / "table.html", as_html(sweep, points, command, pictures, tables, claims))
    return [out / "table.csv", out / "table.html", *pictures]


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
            row += [score.get(key, "") for key in ("value", "low", "high", "n")]
        writer.writerow(["" if x is None else x for x in [*row, point.out, point.error]])
    return lines.getvalue()


def as_html(
    sweep: Sweep, points: Sequence[Point], command: str, pictures: Sequence[Path],
    tables: Sequence[Table], claims: Sequence[Claim],
) -> str:  # fmt: skip
    """Return the page of a sweep: one self-contained file."""
    grid = make_grid(sweep, points)
    heads, rows = rows_of(grid, points, tables)
    same = "; ".join(f"{name} {cell(score)}" for name, score in grid.same.items())
    parts = [
        f"<header><h1>{escape(sweep.name)}</h1><p class=muted>{len(points)} points</p></header>",
        section(
            "Scores",
            html_table(heads, rows, range(1, len(heads)))
            + (f"<p class=muted>Equal in all points: {escape(same)}</p>" if same else ""),
            "With the 95 % intervals.",
        ),
    ]
    for (score, what), values in scan_tables(points).items():
        scanned, lines = scan_rows(points, score, values)
        body = html_table(scanned, lines, range(1, len(scanned)))
        parts.append(section(f"{score.removeprefix('eval/')} against {what}", body))
    if pictures:
        body = "".join(f"<div class=wide>{picture_tag(p, p.stem)}</div>" for p in pictures)
        parts.append(section("Charts", body))
    said = "".join(f"<p>{escape(line)}</p>" for line in provenance(tables, claims))
    if said:
        parts.append(section("What was published", said))
    parts.append(section("Run it again", f"<pre class=command>{escape(command)}</pre>"))
    return document(f"Sweep {sweep.name}", parts)


def draw_pictures(sweep: Sweep, points: Sequence[Point], out: Path) -> list[Path]:
    """Draw the sweep's metric over its settings, and every score that was scanned."""
    done = [p for p in points if p.scores]
    if not done:
        return []
    made = []
    grid = make_grid(sweep, points)
    metric = sweep.metric if sweep.metric in grid.columns else next(iter(grid.columns), None)
    names = list(done[0].settings)
    short = list(short_names(dict.fromkeys(names)))
    if metric is not None and names:
        path = out / "picture.png"
        scored = [p for p in done if metric in p.scores]
        if len(names) == 2 and scored:
            x, y = names
            cells = {
                (text_of(p.settings[x]), text_of(p.settings[y])): p.scores[metric]["value"]
                for p in scored
            }
            charts.heat(path, cells, across=short[0], up=short[1], title=metric)
        elif scored:
            lines: dict[str, list[charts.Point]] = {}
            for p in scored:
                *others, last = p.settings.values()
                label = " ".join(f"{k}={text_of(v)}" for k, v in zip(short, others, strict=False))
                lines.setdefault(label, []).append(_chart_point(last, p.scores[metric]))
            charts.lines(path, lines, across=short[-1], up=metric)
        made.append(path)
    for (score, what), values in scan_tables(points).items():
        path = out / f"{score.rpartition('/')[2]}-{what}.png"
        lines = {}
        for p in done:
            for value, candidates in values.items():
                for name in set(candidates) & p.scores.keys():
                    lines.setdefault(p.label, []).append(_chart_point(value, p.scores[name]))
        charts.lines(path, lines, across=what, up=score)
        made.append(path)
    return made


def _chart_point(x: Any, score: Mapping[str, Any]) -> Any:
    number = isinstance(x, int | float) and not isinstance(x, bool)
    return charts.Point(
        x if number else text_of(x), score["value"], score.get("low"), score.get("high")
    )


def _write(path: Path, text: str) -> None:
    """Write a file; it appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)

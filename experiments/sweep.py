"""Every combination of a sweep's settings, one after another: `python -m experiments.sweep FILE`.

The file is the one that a W&B agent runs (`wandb sweep FILE`, `wandb agent ID`); no account is
needed here. Stages whose results stand are shared, so sixteen ways of sampling train once, and
points that are finished are not repeated.
"""

import argparse
import csv
import io
import itertools
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich import box
from rich.table import Table

from experiments import run as door
from experiments.config import ConfigError, RunSettings, UserError, load, stage_key, to_yaml
from experiments.progress import clock
from experiments.reported import Claim, every_reported
from experiments.reported import Table as Published
from experiments.store import Store, is_leader

COMMAND = "python -m experiments.sweep"
PROGRAM = "experiments.run"
KNOWN = {
    "program", "command", "method", "metric", "parameters", "name", "description", "project",
    "entity", "run_cap",
}  # fmt: skip
MACRO = re.compile(r"\$\{\w+(:\w+)?\}")
Scores = Mapping[str, Mapping[str, Any]]

EPILOG = f"""settings: key=value words hold for every point and win over the file.

examples:
  {COMMAND} sweeps/paella_steps.yaml
  {COMMAND} sweeps/ldmae_autoencoders.yaml sweeps/ldmae_losses.yaml
  {COMMAND} sweeps/paella_steps.yaml eval.prompts=64 --dry-run

Writes table.csv, table.html and pictures into --out (default: runs/sweep-NAME), and every point's
run into a folder there. The same command resumes."""


@dataclass(frozen=True)
class Sweep:
    """A sweep file."""

    name: str
    metric: str | None
    minimize: bool
    words: list[str]
    """Fixed words of the command, as `--paper paella`."""
    values: dict[str, list[Any]]
    """Setting -> its values; one value where it is fixed."""

    @property
    def varied(self) -> list[str]:
        """Settings with more than one value."""
        return [name for name, values in self.values.items() if len(values) > 1]


@dataclass
class Point:
    """One combination of settings, and what became of it."""

    settings: dict[str, Any]
    """The varied settings."""
    argv: list[str]
    """Words for experiments.run."""
    paper: str
    scale: str
    config: RunSettings
    out: Path
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str | None = None

    @property
    def label(self) -> str:
        """The varied settings in words."""
        return " ".join(f"{k}={_text(v)}" for k, v in _short(self.settings).items())


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code (0, 1 failed, 2 refused, 130/143 interrupted)."""
    signals = door.Signals()
    try:
        return run(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit):
        if signals.received is None:
            raise
        print("interrupted; the same command resumes", file=sys.stderr)
        return 128 + signals.received
    finally:
        signals.restore()


def run(argv: Sequence[str]) -> int:
    """Do what the command line asks for; returns 0, or 1 where a point failed.

    Raises:
        ConfigError: a wrong word or file; nothing was started.
    """
    parser = make_parser()
    args, words = parser.parse_known_args(argv)
    if args.help:
        print(parser.format_help())
        return 0
    files = [Path(w) for w in words if w.endswith((".yaml", ".yml")) and "=" not in w]
    settings = [w for w in words if not (w.endswith((".yaml", ".yml")) and "=" not in w)]
    if not files:
        raise ConfigError("name a sweep file, e.g. sweeps/paella_steps.yaml")
    for word in settings:
        if "=" not in word:
            raise ConfigError(f"{word!r} is neither a sweep file nor a setting key=value")
    if args.out is not None and len(files) > 1:
        raise ConfigError("--out takes the results of one sweep; give one file")
    sweeps = [read_sweep(path) for path in files]
    grids = [(s, *make_points(s, settings, args.out)) for s in sweeps]  # all checked before work
    if args.dry_run:
        for sweep, out, points in grids:
            print(f"{sweep.name}: {len(points)} points into {out}")
            for point in points:
                state = "stands" if stands(point) else "to do"
                print(f"  {state}  {PROGRAM} {shlex.join(point.argv)}")
        return 0
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    door.quiet()
    say = door.speaker()
    failed = 0
    for sweep, out, points in grids:
        do_points(sweep, points, say)
        if is_leader():
            published = every_reported().of_sweep(sweep.name)
            command = shlex.join([*COMMAND.split(), *argv])
            files_made = write_results(sweep, points, out, command, *published)
            show(sweep, points, files_made, *published)
        failed += sum(point.error is not None for point in points)
    return 1 if failed else 0


def make_parser() -> door.Parser:
    """Make the parser of all options; its help explains them."""
    parser = door.Parser(
        prog=COMMAND, usage=f"{COMMAND} FILE [FILE ...] [--out DIR] [--dry-run] [key=value ...]",
        description=(__doc__ or "").splitlines()[0], epilog=EPILOG, add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="print the points and which stand")
    parser.add_argument("--help", "-h", action="store_true", help="this text")
    return parser


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file in W&B's format, of which a grid of given values can be run here.

    Raises:
        ConfigError: no readable file, or something in it that only a W&B server can do.
    """
    if not path.is_file():
        raise ConfigError(f"there is no sweep file {path}")
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # PyYAML's and OmegaConf's errors share no base
        raise ConfigError(f"{path}: no readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("parameters"), dict):
        raise ConfigError(f"{path}: a sweep has `parameters`, a table of settings")
    strange = sorted(set(content) - KNOWN)
    if strange:
        raise ConfigError(f"{path}: {strange[0]} is for a W&B server; here goes a plain grid")
    if content.get("method") != "grid":
        raise ConfigError(f"{path}: method must be grid, got {content.get('method')}; "
                          "an agent of W&B runs the others")  # fmt: skip
    values: dict[str, list[Any]] = {}
    for name, given in content["parameters"].items():
        if not isinstance(given, dict) or set(given) not in ({"value"}, {"values"}):
            raise ConfigError(f"{path}: {name} needs `value: x` or `values: [x, y]`, got {given}")
        values[name] = given["values"] if "values" in given else [given["value"]]
        if not isinstance(values[name], list) or not values[name]:
            raise ConfigError(f"{path}: {name}.values must be a list with something in it")
    metric = content.get("metric") or {}
    return Sweep(
        name=path.stem,
        metric=metric.get("name"),
        minimize=metric.get("goal") == "minimize",
        words=_fixed_words(path, content),
        values=values,
    )


def _fixed_words(path: Path, content: Mapping[str, Any]) -> list[str]:
    """Words that stand in the sweep's command besides W&B's macros."""
    command = [str(word) for word in content.get("command") or []]
    program = str(content.get("program") or "")
    if PROGRAM not in command and not program.endswith("experiments/run.py"):
        raise ConfigError(f"{path}: command must run {PROGRAM}: [python, -m, {PROGRAM}, ${{args}}]")
    after = command[command.index(PROGRAM) + 1 :] if PROGRAM in command else []
    return [word for word in after if not MACRO.fullmatch(word)]


def make_points(sweep: Sweep, words: Sequence[str], out: Path | None) -> tuple[Path, list[Point]]:
    """Make the checked config of every combination, the last setting changing fastest.

    Args:
        sweep: what was read.
        words: `key=value`, for all points; a setting of the sweep that is named is fixed by it.
        out: folder of the results; default runs/sweep-NAME, with a hash where `words` are given.

    Raises:
        ConfigError: a combination that cannot be.
    """
    fixed = {word.partition("=")[0].removeprefix("--") for word in words}
    values = {name: given for name, given in sweep.values.items() if name not in fixed}
    if out is None:
        end = f"-{stage_key(sorted(words))[:8]}" if words else ""
        out = Path("runs") / f"sweep-{sweep.name}{end}"
    loggers = [] if any(w.startswith(("logger=", "--logger=")) for w in words) else ["logger=csv"]
    points = []
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        argv = [*sweep.words, *(f"--{k}={_text(v)}" for k, v in chosen.items()), *words]
        args, settings = door.parse(argv)
        if args.paper is None:
            raise ConfigError(f"the sweep {sweep.name} names no paper: add paper to its parameters")
        own = [] if "logger" in chosen else loggers
        config = load(args.paper, args.scale, [*own, *settings])
        varied = {k: v for k, v in chosen.items() if len(values[k]) > 1}
        name = re.sub(r"[^\w.,=+-]+", "_", ",".join(f"{k}={_text(v)}"
                      for k, v in _short(varied).items())) or "point"  # fmt: skip
        points.append(Point(varied, argv, args.paper, Path(args.scale).stem, config, out / name))
    return out, points


def stands(point: Point) -> bool:
    """Say whether a point's results are there, made with these settings."""
    from experiments import stages

    try:
        if (point.out / "config.yaml").read_text() != to_yaml(point.config):
            return False
        report = stages.plan(point.paper, point.config)[-1]
    except (OSError, UserError):
        return False
    return (point.out / "metrics.json").is_file() and (
        Store(point.config.cache).done(report) is not None
    )


def do_points(sweep: Sweep, points: Sequence[Point], say: Callable[[str], None]) -> None:
    """Run every point that does not stand; one that fails is noted, and the next begins."""
    from experiments import stages

    last: float | None = None
    for number, point in enumerate(points, 1):
        head = f"[{number}/{len(points)}] {sweep.name}: {point.label}".rstrip(": ")
        if stands(point):
            say(f"{head}: stands in {point.out}")
        else:
            left = [p for p in points[number - 1 :] if not stands(p)]
            # as the one before; the first of a sweep often trains what the others share
            guess = "" if last is None else f" (about {clock(last * len(left))} left in all)"
            say(f"{head}{guess}")
            start = time.monotonic()
            try:
                stages.run(
                    point.paper, point.scale, point.config, point.out,
                    command=shlex.join([*door.COMMAND.split(), *point.argv]),
                    say=lambda line: None if " reused from " in line else say(f"    {line}"),
                )  # fmt: skip
            except UserError as error:
                point.error = str(error)
                say(f"    failed: {error}")
                continue
            last = time.monotonic() - start
        if is_leader():
            point.scores = json.loads((point.out / "metrics.json").read_text())


# Tables ----


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
    from experiments.report import main_scores

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
    grid: Grid, points: Sequence[Point], tables: Sequence[Published]
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
    heads = list(_short(dict.fromkeys(grid.settings)))
    for column in grid.columns:
        heads.append(column.removeprefix("eval/"))
        if column in beside:
            heads.append(f"{beside[column][1]}, published")
    heads += [f"{name}, published" for _, name in lone]
    rows = []
    for point in points:
        row = [_text(point.settings[s]) for s in grid.settings]
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


def _published(point: Point, table: Published, name: str) -> str:
    value = table.rows.get(_text(point.settings[table.setting or ""]), {}).get(name)
    return "" if value is None else f"{value:g}"


def scan_tables(points: Sequence[Point]) -> dict[tuple[str, str], dict[float, list[str]]]:
    """Return scores at several values of something: (score, what) -> value -> name per point."""
    from experiments.report import scans

    found: dict[tuple[str, str], dict[float, list[str]]] = {}
    for point in points:
        for key, places in scans(point.scores).items():
            for value, name in places:
                found.setdefault(key, {}).setdefault(value, []).append(name)
    return {key: dict(sorted(rows.items())) for key, rows in found.items()}


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


def show(
    sweep: Sweep, points: Sequence[Point], files: Sequence[Path],
    tables: Sequence[Published], claims: Sequence[Claim],
) -> None:  # fmt: skip
    """Print the tables, what was published, and the paths of what was made."""
    console, grid = door.console(), make_grid(sweep, points)

    def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        made = Table(*heads, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for row in rows:
            made.add_row(*row)
        console.print(made)

    print(f"\n{sweep.name}: scores with their 95 % intervals")
    table(*rows_of(grid, points, tables))
    for name, shared in grid.same.items():
        print(f"in all points: {name} {cell(shared)}")
    for (score, what), values in scan_tables(points).items():
        print(f"\n{score} against {what}")
        table(*scan_rows(points, score, values))
    for line in provenance(tables, claims):
        print(line)
    for point in points:
        if point.error:
            print(f"failed: {point.label}: {point.error}")
    print("\n".join(["", *(f"  {path}" for path in files)]))


def provenance(tables: Sequence[Published], claims: Sequence[Claim]) -> Iterator[str]:
    """Say where published numbers come from."""
    for table in tables:
        yield f"published: {table.title}; {table.source}; evidence: {table.evidence}; " + (
            f"{table.protocol}. Another data set and size: compare the order, not the numbers."
        )
    for claim in claims:
        yield f"published: {claim.claim} {claim.source}; evidence: {claim.evidence}"


# Files ----


def write_results(
    sweep: Sweep, points: Sequence[Point], out: Path, command: str,
    tables: Sequence[Published], claims: Sequence[Claim],
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
        row: list[Any] = [_text(point.settings[s]) for s in settings]
        for name in names:
            score = point.scores.get(name, {})
            row += [score.get(key, "") for key in ("value", "low", "high", "n")]
        writer.writerow(["" if x is None else x for x in [*row, point.out, point.error]])
    return lines.getvalue()


def as_html(
    sweep: Sweep, points: Sequence[Point], command: str, pictures: Sequence[Path],
    tables: Sequence[Published], claims: Sequence[Claim],
) -> str:  # fmt: skip
    """Return the page of a sweep: one self-contained file."""
    from experiments.report import document, html_table, picture_tag, section

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
    from experiments import charts

    done = [p for p in points if p.scores]
    if not done:
        return []
    made = []
    grid = make_grid(sweep, points)
    metric = sweep.metric if sweep.metric in grid.columns else next(iter(grid.columns), None)
    names = list(done[0].settings)
    short = list(_short(dict.fromkeys(names)))
    if metric is not None and names:
        path = out / "picture.png"
        scored = [p for p in done if metric in p.scores]
        if len(names) == 2 and scored:
            x, y = names
            cells = {
                (_text(p.settings[x]), _text(p.settings[y])): p.scores[metric]["value"]
                for p in scored
            }
            charts.heat(path, cells, across=short[0], up=short[1], title=metric)
        elif scored:
            lines: dict[str, list[charts.Point]] = {}
            for p in scored:
                *others, last = p.settings.values()
                label = " ".join(f"{k}={_text(v)}" for k, v in zip(short, others, strict=False))
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
    from experiments.charts import Point as ChartPoint

    number = isinstance(x, int | float) and not isinstance(x, bool)
    return ChartPoint(
        x if number else _text(x), score["value"], score.get("low"), score.get("high")
    )


def _write(path: Path, text: str) -> None:
    """Write a file; it appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _text(value: Any) -> str:
    """Write a value as W&B's agent puts it on the command line."""
    return str(value)


def _short(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by their last names, where these differ."""
    lasts = [name.rpartition(".")[2] for name in settings]
    return {
        last if lasts.count(last) == 1 else name: value
        for (name, value), last in zip(settings.items(), lasts, strict=True)
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

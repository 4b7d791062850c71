"""One page of all sweeps: pictures, what papers claim and what holds here, then every table."""

import csv
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from data.files import write_text
from eval.scorers import METRICS
from experiments.cli import counted
from experiments.grid import SweepRun
from experiments.pipeline.store import Store
from experiments.report import charts, samplers
from experiments.report.claims import Verdict, verdict
from experiments.report.document import (
    anchor,
    boxes,
    code,
    details,
    document,
    html_table,
    link_to,
    paragraphs,
    picture_tag,
    section,
)
from experiments.report.frontier import are_several
from experiments.report.measured import Done, measured_csv
from experiments.report.published import Claim, Published, Table, load_all
from experiments.report.tables import draw, summarize

STATES = ("holds", "does not hold", "not resolvable here", "not measured")
LONG = 40  # rows of a table; those of longer ones are shown on demand
WALL = 6  # prompts of the pictures that stand beside each other


class Judged(NamedTuple):
    """A claim of a paper and what was found."""

    paper: str
    claim: Claim
    verdict: Verdict


def judged(sweeps: Sequence[Done]) -> list[Judged]:
    """Test every claim of every paper on the runs of its sweep."""
    runs = {done.sweep.name: done.runs for done in sweeps}
    return [
        Judged(paper, claim, verdict(claim, runs.get(claim.sweep or "", []), METRICS))
        for paper, published in load_all().items()
        for claim in published.claims
    ]


def write_overview(sweeps: Sequence[Done], out: Path, command: str) -> list[Path]:
    """Write index.html, measured.csv, claims.csv and the charts; returns their paths.

    Args:
        sweeps: those with at least one run that is done are shown.
        out: the folder.
        command: what was typed.
    """
    shown = [done for done in sweeps if any(run.scores for run in done.runs)]
    claims = judged(shown)
    figures = {done.sweep.name: draw(done.sweep, done.runs) for done in shown}
    sampled = samplers.beside_own([done.runs for done in shown])
    figures["samplers"] = {
        f"{paper}.png": drawn for paper, drawn in samplers.frontiers(sampled).items()
    }
    write_text(out / "index.html", _page(shown, claims, sampled, figures, command))
    write_text(out / "measured.csv", measured_csv(shown))
    write_text(out / "claims.csv", _claims_csv(claims))
    paths = [out / name for name in ("index.html", "measured.csv", "claims.csv")]
    for name, drawn in figures.items():
        for file, figure in drawn.items():
            paths.append(out / f"{name}-{file}")
            charts.save(paths[-1], figure)
    return paths


def _page(
    sweeps: Sequence[Done],
    claims: Sequence[Judged],
    sampled: Sequence[samplers.Sampled],
    figures: Mapping[str, Mapping[str, Figure]],
    command: str,
) -> str:
    counts = {state: sum(c.verdict.state == state for c in claims) for state in STATES}
    runs = sum(bool(run.scores) for done in sweeps for run in done.runs)
    told = ", ".join(f"{n} {state}" for state, n in counts.items())
    published = load_all()
    together = [done for done in sweeps if are_several(done.runs)]
    return document(
        "Papers and what was measured",
        [
            "<h1>Papers and what was measured</h1>"
            f"<p class=muted>{counted(len(sweeps), 'sweep')}, {counted(runs, 'run')}</p>",
            section("The same prompts and seeds", _wall(sweeps), "The best run of each paper."),
            *(_sweep(done, figures[done.sweep.name], claims) for done in together),
            section(f"What is claimed: {told}", _claims_table(claims)),
            _samplers(sampled, figures["samplers"]),
            section("Tables", _contents(published, sweeps)),
            *(_sweep(d, figures[d.sweep.name], claims) for d in sweeps if d not in together),
            *(
                _published(paper, name, table)
                for paper, found in published.items()
                for name, table in found.tables.items()
            ),
            section("Make this page again", code(command)),
        ],
    )


def _samplers(sampled: Sequence[samplers.Sampled], figures: Mapping[str, Figure]) -> str:
    """Show the samplers of every paper beside its own loop."""
    if not sampled:
        return ""
    body = ""
    for paper, (heads, rows) in samplers.tables(sampled).items():
        drawn = charts.chart_tag(figures[f"{paper}.png"], f"samplers of {paper}")
        body += f"<h3>{escape(paper)}</h3>{boxes('charts', [drawn])}{html_table(heads, rows)}"
    about = (
        "Every sampler at the best of the settings that were tried, against the paper's own loop "
        "on the same prompts, seeds and calls (95 % intervals by pairs, as McNemar's test)."
    )
    return section("Samplers on the same checkpoints", body, about)


def best_runs(sweeps: Sequence[Done]) -> dict[str, SweepRun]:
    """Return the run of every paper that has the highest share of right pictures.

    First repetitions come first: all papers have drawn theirs with the same seeds.
    """
    score = "eval/scene_accuracy"
    found: dict[str, list[SweepRun]] = {}
    for run in (run for done in sweeps for run in done.runs if score in run.scores):
        found.setdefault(run.paper, []).append(run)
    return {
        paper: max(runs, key=lambda run: (run.repeat == 0, run.scores[score]["value"]))
        for paper, runs in found.items()
    }


def _wall(sweeps: Sequence[Done]) -> str:
    """Lay out the first pictures of every paper's best run, a row for a prompt."""
    rows: dict[tuple[str, int], dict[str, str]] = {}
    best = best_runs(sweeps)
    for paper, run in best.items():
        folders = Store(run.config.cache).folders
        sample = run.plan.samples.get("eval")
        if sample is None or not folders[sample].is_dir():
            continue
        for row in sample.rows(folders)[:WALL]:
            picture = folders[sample] / row["file"]
            if picture.is_file():
                tag = picture_tag(picture, f"{paper}: {row['prompt']}")
                rows.setdefault((row["prompt"], row["seed"]), {})[paper] = tag
    if not rows:
        return ""
    heads = "".join(f"<th>{escape(paper)}</th>" for paper in best)
    lines = [
        f"<tr><td>{escape(prompt)}<small>seed {seed}</small></td>"
        + "".join(f"<td>{cells.get(paper, '')}</td>" for paper in best)
        + "</tr>"
        for (prompt, seed), cells in rows.items()
    ]
    table = f"<table><thead><tr><th>prompt</th>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="wide wall" tabindex="0">{table}</table></div>'


def _claims_table(claims: Sequence[Judged]) -> str:
    """Tabulate claims by verdict; those of which nothing was run stand below, on demand."""
    measured = [c for c in claims if c.verdict.state != "not measured"]
    measured.sort(key=lambda c: STATES.index(c.verdict.state))
    rows = [
        [
            _told(c),
            c.verdict.state,
            c.verdict.why,
            "" if c.verdict.smallest is None else f"{c.verdict.smallest:.2g}",
            f"python -m experiments.sweep sweeps/{c.claim.sweep}.yaml",
        ]
        for c in measured
    ]
    heads = ["claim", "here", "difference", "smallest that could be seen", "command"]
    others = [[_told(c), c.verdict.why] for c in claims if c not in measured]
    return html_table(heads, rows) + details(
        f"{len(others)} not measured", html_table(["claim", "why"], others)
    )


def _told(found: Judged) -> str:
    claim = found.claim
    return f"{claim.claim}\n{found.paper}: {claim.source}; evidence: {claim.evidence}"


def _contents(published: Mapping[str, Published], sweeps: Sequence[Done]) -> str:
    """List every table by paper, with links."""
    there = {done.sweep.name for done in sweeps}
    lines = []
    for paper, found in published.items():
        links = []
        for name, table in found.tables.items():
            links.append(link_to(f"{paper}-{name}", f"{table.source}: {table.title}"))
            if table.sweep in there:
                links.append(link_to(f"sweep-{table.sweep}", f"measured: {table.sweep}"))
        own = [s for s in sorted(there) if s.startswith(paper) or s.startswith(f"samplers_{paper}")]
        links += [link_to(f"sweep-{name}", f"measured: {name}") for name in own]
        items = "".join(f"<li>{link}</li>" for link in dict.fromkeys(links))
        lines.append(f"<h3>{escape(paper)}</h3><ul>{items}</ul>")
    rest = [s for s in sorted(there) if not s.startswith((*published, "samplers_"))]
    if rest:
        items = "".join(f"<li>{link_to(f'sweep-{name}', name)}</li>" for name in rest)
        lines.append(f"<h3>All papers</h3><ul>{items}</ul>")
    return "".join(lines)


def _sweep(done: Done, figures: Mapping[str, Figure], claims: Sequence[Judged]) -> str:
    """Show the runs of a sweep: charts, tables, what was published and what is claimed."""
    name = done.sweep.name
    published = Published()
    for found in load_all().values():
        own = found.of_sweep(name)
        published.tables.update(own.tables)
    tables, notes, sources = summarize(done.sweep, done.runs, published)
    drawn = [
        charts.chart_tag(figure, f"{name} {Path(file).stem}") for file, figure in figures.items()
    ]
    body = paragraphs(notes) + boxes("charts", drawn)
    for table in tables:
        shown = html_table(table.heads, table.rows)
        if len(table.rows) > LONG:
            shown = details(f"all {len(table.rows)} rows", shown)
        body += f"<h3>{escape(table.title)}</h3>{shown}"
    body += _claims_table([c for c in claims if c.claim.sweep == name]) + paragraphs(sources)
    body += code(f"python -m experiments.sweep sweeps/{name}.yaml")
    return anchor(f"sweep-{name}", section(name, body))


def _published(paper: str, name: str, table: Table) -> str:
    """Show a published table as it stands in the paper."""
    rows = [
        [row, *(f"{cells[c]:g}" if c in cells else "" for c in table.columns)]
        for row, cells in table.rows.items()
    ]
    about = f"{table.source}; evidence: {table.evidence}; {table.protocol}"
    if table.reason:
        about += f". No sweep of this suite measures it: {table.reason}."
    body = html_table([table.setting or "", *table.columns], rows)
    return anchor(f"{paper}-{name}", section(f"Published, {paper}: {table.title}", body, about))


def _claims_csv(claims: Sequence[Judged]) -> str:
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    heads = "paper claim source evidence sweep score verdict difference smallest"
    writer.writerow(heads.split())
    for paper, claim, found in claims:
        known = [claim.claim, claim.source, claim.evidence, claim.sweep, claim.score]
        writer.writerow([paper, *known, found.state, found.why, found.smallest])
    return lines.getvalue()

"""The page of a run: pictures and one score first, then everything that stands behind them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import NamedTuple

from data.files import write_text
from eval.metric import Metric
from experiments.progress import clock
from experiments.report import charts, scores
from experiments.report.document import (
    Picture,
    boxes,
    clamped,
    code,
    details,
    document,
    html_table,
    paragraphs,
    picture_tag,
    section,
)
from experiments.report.scores import Scores

FIRST = 6  # pictures of a split that are shown at once; the others on demand
EXAMPLES = {
    "val": "Prompts",
    "heldout": "Prompts with combinations never seen (heldout)",
    "partial": "Prompts that leave something out, each asked 4 times (partial)",
    "edit": "Edits: the picture, the half that was masked, and what a new caption made of it",
}


@dataclass
class Example:
    """One prompt with its picture and what the classifier read in it."""

    image: Picture
    prompt: str
    split: str = "val"
    seed: int | None = None
    right: bool | None = None
    """True = everything asked is in the picture; None = not known."""
    detail: str = ""
    """What was asked and what was read; shown where the picture is wrong."""


@dataclass
class Trace:
    """How the tokens of one prompt change from the first to the last step."""

    prompt: str
    strip: Picture
    """Made by `pictures.strip`."""
    changed: list[int]
    """Number of tokens that each step changed."""
    tokens: int = 0
    """Number of tokens in the picture; 0 = not known."""


class StageRow(NamedTuple):
    """One stage of the run."""

    name: str
    key: str
    seconds: float
    skipped: Mapping[str, int] = {}
    """Samples that it read, "seen", and those that it left out, by kind of fault."""
    examples: Mapping[str, str] = {}
    """The last one of a kind: shard and key."""


@dataclass
class RunPage:
    """Everything that the page shows; empty parts are left out."""

    title: str
    command: str
    machine: str = ""
    """Device and library versions in words."""
    scores: Scores = field(default_factory=dict)
    """The first is the headline; `report.scores` explains the names."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """Last part of a score's name -> how it is called."""
    notes: list[str] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """Name (train/loss, val/loss) -> (step, value)."""
    reconstructions: Sequence[tuple[Picture, Picture]] = field(default_factory=list)
    """Pairs (original, reconstruction)."""
    config_yaml: str = ""
    stages: list[StageRow] = field(default_factory=list)
    files: Mapping[str, Path | str] = field(default_factory=dict)


def write_page(path: Path, page: RunPage) -> None:
    """Write the page; it loads nothing from elsewhere and appears whole or not at all.

    Args:
        path: the HTML file.
        page: what to show.

    Raises:
        OSError: a picture file that is not there or no image.
    """
    write_text(path, render(page))


def render(page: RunPage) -> str:
    """Return the whole page as text."""
    # pictures come first: those of the first split, or all that a first stage has
    first, *others = [*_examples(page.examples), _reconstructions(page)]
    parts = [
        f"<h1>{escape(page.title)}</h1><p class=muted>{escape(page.machine)}</p>",
        _headline(page),
        first,
        _scores(page),
        *others[:-1],
        _traces(page.traces),
        _curves(page.curves),
        _attributes(page),
        _scans(page),
        _first_stage(page),
        *others[-1:],
        _repeat(page),
    ]
    return document(page.title, parts)


def _headline(page: RunPage) -> str:
    """The first score, large, with all that is needed to read it."""
    own = filter(scores.is_generated, scores.main_scores(page.scores))
    name = next(own, None)
    if name is None:
        return ""
    score, metric = page.scores[name], scores.metric_of(name, page.metrics)
    value, _, interval = scores.notation(score).partition(" ")
    split = scores.split_of(name)
    counted = f" 95 % interval of n = {score['n']:,}." if score.get("n") and interval else ""
    about = f"{metric.label}, {split}: {_about(metric)}".removesuffix(": ") + f".{counted}"
    large = f"<p class=value><strong>{escape(value)}</strong> {escape(interval)}</p>"
    return f"<div class=headline>{large}<p>{escape(about)}</p></div>"


def _about(metric: Metric) -> str:
    """What a metric says and which way is better."""
    better = f"{metric.better} is better" if metric.better else ""
    return "; ".join(text for text in (metric.what, better) if text)


def _scores(page: RunPage) -> str:
    notes = paragraphs(f"Note: {note}" for note in page.notes)
    about = "Each with its 95 % interval; n is the number of pictures."
    return section("Scores", _score_tables(page, True) + _stored(page.scores) + notes, about)


def _first_stage(page: RunPage) -> str:
    about = "What the generator builds on, by its reconstructions of real pictures."
    return section("First stage", _score_tables(page, False), about)


def _score_tables(page: RunPage, generated: bool) -> str:
    """A table per split, of the run's own scores or of those of its first stage."""
    rows: dict[str, list[list[str]]] = {}
    explained: list[Metric] = []
    for name in scores.main_scores(page.scores):
        if scores.is_generated(name) == generated:
            score, metric = page.scores[name], scores.metric_of(name, page.metrics)
            # what a score means stands where it comes first
            meaning = "" if metric in explained else f"\n{_about(metric)}"
            explained.append(metric)
            below = [f"n = {score['n']:,}"] if score.get("n") is not None else []
            for end, word in scores.COMPANIONS.items():
                if name + end in page.scores:
                    below.append(f"{word} {scores.notation(page.scores[name + end])}")
            value = f"{scores.notation(score)}\n{', '.join(below)}"
            rows.setdefault(scores.split_of(name), []).append([metric.label + meaning, value])
    return "".join(
        f"<h3>{escape(scores.SPLITS.get(split, split))}</h3>"
        f"<div class=scores>{html_table(['score', 'value'], body)}</div>"
        for split, body in rows.items()
    )


def _stored(stored: Scores) -> str:
    rows = []
    for name, score in stored.items():
        more = [f"{k}: {v}" for k, v in score.items() if k not in ("value", "low", "high", "n")]
        rows.append([name, scores.notation(score), str(score.get("n", "")), ", ".join(more)])
    table = html_table(["score", "value", "n", "made with"], rows)
    return details("All scores as stored", table)


def _attributes(page: RunPage) -> str:
    """A table of the scores that are parts of another, one column per split."""
    splits: list[str] = []
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for name in page.scores:
        parent = scores.parent_of(name, page.scores)
        if parent and not scores.scan_value(name):
            key = scores.metric_of(parent, page.metrics).label, name.removeprefix(f"{parent}/")
            rows.setdefault(key, {})[scores.split_of(parent)] = scores.notation(page.scores[name])
            splits.append(scores.split_of(parent))
    splits = list(dict.fromkeys(splits))
    several = len({label for label, _ in rows}) > 1
    body = [
        [f"{label}: {part}" if several else part, *(cells.get(split, "") for split in splits)]
        for (label, part), cells in rows.items()
    ]
    table = html_table(["attribute", *splits], body)
    return section("By attribute", table, "Share that is right, with its 95 % interval.")


def _examples(examples: Sequence[Example]) -> list[str]:
    """A section per split: its first pictures, and the others on demand."""
    sections = []
    for split in dict.fromkeys(e.split for e in examples):
        chosen = [e for e in examples if e.split == split]
        known = [e.right for e in chosen if e.right is not None]
        about = f"{sum(known)} of the {len(known)} shown here are right." if known else ""
        body = _grid(chosen[:FIRST]) + details(f"{len(chosen) - FIRST} more", _grid(chosen[FIRST:]))
        sections.append(section(EXAMPLES.get(split, f"Prompts: {split}"), body, about))
    return sections


def _grid(examples: Sequence[Example]) -> str:
    return boxes("examples", map(_example, examples))


def _example(example: Example) -> str:
    word = {True: "right", False: "wrong", None: ""}[example.right]
    mark = f'<span class="mark {word}">{word}</span>' if word else ""
    seed = f"<span class=muted>seed {example.seed}</span>" if example.seed is not None else ""
    detail = clamped(example.detail) if word == "wrong" else ""
    return (
        f'<figure class="example {word}">{picture_tag(example.image, example.prompt)}'
        f"<figcaption>{clamped(example.prompt)}{detail}"
        f"<p class=line>{mark}{seed}</p></figcaption></figure>"
    )


def _traces(traces: Sequence[Trace]) -> str:
    figures = []
    for trace in traces:
        of = f" of {trace.tokens}" if trace.tokens else ""
        counts = ", ".join(map(str, trace.changed))
        told = f"Tokens changed at each step{of}: {counts}" if trace.changed else ""
        alt = f"Steps of: {trace.prompt}. {told}".rstrip()
        figures.append(
            f"<figure><figcaption>{clamped(trace.prompt)}</figcaption>"
            f"{picture_tag(trace.strip, alt)}{clamped(told)}</figure>"
        )
    counted = any(trace.changed for trace in traces)
    what = "tokens change" if counted else "a picture comes about"
    grid = ", and below it the token grid: orange where the step changed the token."
    about = "The picture after every step" + (grid if counted else ", or after some of many.")
    return section(f"How {what} from first to last step", boxes("traces", figures), about)


def _curves(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """One chart per quantity; train/x and val/x share one."""
    found: dict[str, dict[str, list[charts.Value]]] = {}
    for name, values in curves.items():
        line, _, quantity = name.rpartition("/")
        finite = [charts.Value(float(x), float(y)) for x, y in values if math.isfinite(y)]
        if finite:
            found.setdefault(quantity, {})[line or quantity] = finite
    body = [_chart(quantity, lines, "training steps") for quantity, lines in found.items()]
    title = "Loss curve" if list(found) == ["loss"] else "Training curves"
    return section(title, boxes("charts", body))


def _scans(page: RunPage) -> str:
    """Charts of the scores that were measured again at several values of something."""
    body = []
    for (name, what), names in scores.scans(page.scores).items():
        label = scores.metric_of(name, page.metrics).label
        line = [charts.value_of(x, page.scores[name]) for x, name in names.items()]
        body.append(_chart(label, {label: line}, what))
    about = "Strength of the noise that was added to latents before they were decoded."
    return section("Smoothness of the latents", boxes("charts", body), about)


def _chart(quantity: str, lines: Mapping[str, Sequence[charts.Value]], across: str) -> str:
    ends = "; ".join(f"{n} ends at {scores.number(line[-1].y)}" for n, line in lines.items())
    named = {f"{name} {scores.number(line[-1].y)}": line for name, line in lines.items()}
    figure = charts.lines(named, across=across, up=quantity)
    return charts.chart_tag(figure, f"{quantity} over {across}; {ends}")


def _reconstructions(page: RunPage) -> str:
    pairs = [
        f"<figure class=pair>{picture_tag(real, f'original {i}')}"
        f"{picture_tag(made, f'reconstruction {i}')}</figure>"
        for i, (real, made) in enumerate(page.reconstructions, 1)
    ]
    about = "What is kept of a picture: the original left, its reconstruction right."
    return section("Reconstructions", boxes("pairs", pairs), about)


def _repeat(page: RunPage) -> str:
    total = clock(sum(s.seconds for s in page.stages))
    rows = [[s.name, clock(s.seconds), s.key, _left_out(s)] for s in page.stages]
    if rows:
        rows.append(["all", total, "", ""])
    files = [[name, str(path)] for name, path in page.files.items()]
    body = code(page.command)
    body += html_table(["stage", "time", "key", "samples left out"], rows)
    body += html_table(["file", "path"], files)
    return section("Run it again", body + details("Resolved settings", code(page.config_yaml)))


def _left_out(row: StageRow) -> str:
    """Name the reasons; a stage that reads the data several times counts a sample every time."""
    told = {why: f" (last: {text})" for why, text in row.examples.items()}
    counts = sorted((why, n) for why, n in row.skipped.items() if why != "seen")
    reasons = ", ".join(f"{why}: {n}{told.get(why, '')}" for why, n in counts)
    return f"{reasons}, of {row.skipped.get('seen', 0)} read" if reasons else ""

"""The page of a run: one self-contained HTML file, light or dark, for desk and phone."""

import base64
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from experiments.pictures import to_image

Picture = Tensor | Path | Image.Image  # uint8 [3, H, W], a file, or a PIL image


@dataclass
class Card:
    """One prompt with its picture and what the judge says about it."""

    image: Picture
    prompt: str
    split: str = "val"
    seed: int | None = None
    verdict: bool | None = None
    """True = everything asked is in the picture; None = not judged."""
    detail: str = ""
    """What was asked and what was read; shown where the verdict is wrong."""


@dataclass
class Trace:
    """How the tokens of one prompt change from the first to the last step."""

    prompt: str
    strip: Picture
    """Made by `pictures.strip`."""
    changed: list[int]
    """Number of tokens that each step changed."""
    tokens: int = 0
    """Number of tokens in the picture; 0 = not said."""


class StageRow(NamedTuple):
    """One stage of the run."""

    name: str
    key: str
    seconds: float
    reused: bool


@dataclass
class Report:
    """Everything that the page shows; empty parts are left out."""

    title: str
    paper: str
    scale: str
    command: str
    machine: str = ""
    """Device and library versions in words."""
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name -> {"value", "low", "high", "n", ...}; `a/b/part` is a part of `a/b`."""
    notes: list[str] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """Name (train/loss, val/loss) -> points (step, value)."""
    reconstructions: list[tuple[Picture, Picture]] | Picture | None = None
    """Pairs (original, reconstruction), or one picture of them."""
    config_yaml: str = ""
    stages: list[StageRow] = field(default_factory=list)
    skipped: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Stage -> what became of the training samples that it read: "seen", and numbers by reason."""
    files: Mapping[str, Path | str] = field(default_factory=dict)


class Metric(NamedTuple):
    """How a score is called and shown."""

    label: str
    what: str
    percent: bool = False


METRICS = {
    "scene_accuracy": Metric(
        "Scene accuracy", "prompts whose every attribute, relation and background is right", True
    ),
    "object_accuracy": Metric("Asked thing", "edits in which it is there, in its place", True),
    "rest_accuracy": Metric("The rest", "edits after which all else is read as before", True),
    "rest_l1": Metric("L1 of the rest", "to the unedited picture outside the mask; 0 is the same"),
    "digit_accuracy": Metric("Digit accuracy", "samples that a classifier reads as asked", True),
    "fd_scenes": Metric("FD scenes", "Frechet distance in the judge's features; lower is better"),
    "fd_scenes_floor": Metric("FD scenes, floor", "real pictures against real pictures"),
    "clip_scenes": Metric("CLIP scenes", "cosine of picture and prompt; higher is better"),
    "clip_scenes_real": Metric("CLIP scenes, real", "the same for real pictures"),
    "psnr": Metric("PSNR", "dB; higher is better"),
    "ssim": Metric("SSIM", "structural similarity, at most 1; higher is better"),
    "l1": Metric("L1", "mean absolute error of pictures in [0, 1]; lower is better"),
    "mse": Metric("MSE", "mean squared error of pictures in [0, 1]; lower is better"),
    "lpips": Metric("LPIPS", "perceptual distance in VGG16; lower is better"),
    "lpips_scenes": Metric(
        "LPIPS scenes", "distance in LPIPS's form, in a small network of scenes; lower is better"
    ),
    "rfd_scenes": Metric(
        "rFD scenes",
        "Frechet distance of reconstructions to their originals in the judge's features",
    ),
    "sigma2_object": Metric(
        "sigma², objects", "spread of latents within a thing; lower is compacter"
    ),
    "rho_object": Metric("rho, objects", "how far things lie apart in latents; higher is better"),
    "sigma2_part": Metric("sigma², parts", "the same within half a thing"),
    "rho_part": Metric("rho, parts", "the same between the halves of a thing"),
    "codebook_usage": Metric("Codebook usage", "codes that occur at all", True),
    "codebook_perplexity": Metric("Codebook perplexity", "codes in effective use"),
}
COMPANIONS = {"_floor": "floor", "_real": "real pictures"}
SPLITS = {
    "val": "Val",
    "heldout": "Heldout: combinations never seen in training",
    "edit": "Edits: half of a scene generated anew for a caption with another thing",
    "superres": "Super-resolution: val, reduced for the judge",
    "superres heldout": "Super-resolution: heldout, reduced for the judge",
    "tokenizer": "Tokenizer: reconstructions of val",
    "autoencoder": "Autoencoder: reconstructions of val",
}


def write_report(path: Path, report: Report) -> None:
    """Write the page; it loads nothing from elsewhere and appears whole or not at all.

    Args:
        path: the HTML file.
        report: what to show.

    Raises:
        OSError: a picture file that is not there or no image.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(page(report), encoding="utf-8")
    os.replace(temporary, path)


def page(report: Report) -> str:
    """Return the whole page as text."""
    parts = [
        _header(report),
        _headline(report.scores),
        _attributes(report.scores),
        _scans(report.scores),
        *_prompts(report.cards),
        _traces(report.traces),
        _curves(report.curves),
        _reconstructions(report.reconstructions),
        _skipped(report.skipped),
        _repeat(report),
        _config(report),
    ]
    return document(report.title, parts)


def document(title: str, parts: Iterable[str]) -> str:
    """Return a whole page made of parts, of which empty ones are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # nothing may be loaded, whatever a prompt or a note contains
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _header(report: Report) -> str:
    facts = [f"{report.paper}, scale {report.scale}", report.machine]
    line = " · ".join(escape(f) for f in facts if f)
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return (
        f"<header><h1>{escape(report.title)}</h1><p class=muted>{line}</p>"
        + (f"<ul class=notes>{notes}</ul>" if notes else "")
        + "</header>"
    )


def section(title: str, body: str, about: str = "") -> str:
    """Return a part of a page under its title, `about` in small letters between them."""
    intro = f"<p class=muted>{escape(about)}</p>" if about else ""
    return f"<section><h2>{escape(title)}</h2>{intro}{body}</section>"


def _headline(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Tiles of the scores that are not part of another, split by split."""
    tiles: dict[str, str] = {}
    for name in main_scores(scores):
        tiles[_split(name)] = tiles.get(_split(name), "") + _tile(name, scores)
    if not tiles:
        return ""
    body = ""
    for split, inside in tiles.items():
        title = "" if len(tiles) == 1 else f"<h3>{escape(SPLITS.get(split, split))}</h3>"
        body += f"{title}<dl class=tiles>{inside}</dl>"
    about = "With the 95 % interval and the number of samples."
    return section("Scores", body + _all_scores(scores), about)


def _tile(name: str, scores: Mapping[str, Mapping[str, Any]]) -> str:
    """One score; the floor that it is to be compared with stands in its tile."""
    score, metric = scores[name], _metric(name)
    lines = []
    if score.get("low") is not None:
        lines.append(f"{_shown(name, score['low'])} to {_shown(name, score['high'])}")
    if score.get("n") is not None:
        lines.append(f"n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{score['n']:,}")
    lines = [", ".join(lines)] if lines else []
    for end, word in COMPANIONS.items():
        if name + end in scores:
            lines.append(f"{word} {_shown(name, scores[name + end]['value'])}")
    return (
        f"<div class=tile><dt>{escape(metric.label)}</dt>"
        f"<dd class=value>{escape(_shown(name, score['value']))}</dd>"
        + "".join(f"<dd>{escape(text)}</dd>" for text in lines)
        + (f"<dd class=muted>{escape(metric.what)}</dd>" if metric.what else "")
        + "</div>"
    )


def _all_scores(scores: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, score in scores.items():
        known = ("value", "low", "high", "n")
        more = ", ".join(f"{k}: {v}" for k, v in score.items() if k not in known)
        cells = [name, _number(score["value"])]
        low, high = score.get("low"), score.get("high")
        cells.append("" if low is None else f"{_number(low)} to {_number(high)}")
        rows.append([*cells, str(score.get("n", "")), more])
    table = html_table(
        ["score", "value", "95 % interval", "n", "made with"], rows, numbers=(1, 2, 3)
    )
    return f"<details><summary>All scores as stored</summary>{table}</details>"


def _attributes(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the scores that are parts of another, one column per split."""
    parts = {
        name: parent
        for name in scores
        if (parent := _parent(name, scores)) and not scan_point(name)
    }
    if not parts:
        return ""
    splits = list(dict.fromkeys(_split(p) for p in parts.values()))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for name, parent in parts.items():
        score = scores[name]
        text = _shown(parent, score["value"])
        if score.get("low") is not None:
            text += f" ({_shown(parent, score['low'])} to {_shown(parent, score['high'])})"
        key = (_metric(parent).label, name.removeprefix(parent + "/"))
        rows.setdefault(key, {})[_split(parent)] = text
    several = len({label for label, _ in rows}) > 1
    body = [
        [f"{label}: {part}" if several else part, *(cells.get(s, "") for s in splits)]
        for (label, part), cells in rows.items()
    ]
    table = html_table(["attribute", *splits], body, numbers=range(1, len(splits) + 1))
    return section("By attribute", table, "Share that is right, with its 95 % interval.")


def _scans(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Charts of the scores that were measured again at several values of something."""
    charts = ""
    for (score, what), points in scans(scores).items():
        metric = _metric(score)
        title = f"{metric.label} against {what}"
        line = [(x, scores[name]["value"]) for x, name in points]
        charts += (
            f"<figure class=chart><figcaption>{escape(title)}</figcaption>"
            f"{_chart(metric.label, {metric.label: line}, what)}</figure>"
        )
    about = "Strength of the noise that was added to latents before they were decoded."
    return section("Smoothness of the latents", f"<div class=charts>{charts}</div>",
                   about) if charts else ""  # fmt: skip


def scan_point(name: str) -> tuple[str, str, float] | None:
    """Take apart the name of a score at one value of something: a/b/noise=0.1 -> a/b, noise, 0.1.

    None for any other name.
    """
    score, _, point = name.rpartition("/")
    what, equals, value = point.partition("=")
    return (score, what, float(value)) if equals else None


def scans(
    scores: Mapping[str, Mapping[str, Any]],
) -> dict[tuple[str, str], list[tuple[float, str]]]:
    """Collect scores at several values of something; the score without a value stands at 0.

    Returns:
        {(score, what): [(value, name of the score there), ...] in order of the values}.
    """
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for name in scores:
        if point := scan_point(name):
            score, what, value = point
            found.setdefault((score, what), []).append((value, name))
    for (score, _), points in found.items():
        if score in scores:
            points.append((0.0, score))
        points.sort()
    return found


def main_scores(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of the scores that are no part, floor or scan of another, in their order."""
    return [
        name
        for name in scores
        if not (_parent(name, scores) or _companion(name, scores) or scan_point(name))
    ]


def _prompts(cards: Sequence[Card]) -> list[str]:
    """A grid of pictures per split."""
    titles = {
        "val": "Prompts",
        "heldout": "Prompts with combinations never seen (heldout)",
        "edit": "Edits: the picture, the half that was masked, and what a new caption made of it",
    }
    sections = []
    for split in dict.fromkeys(card.split for card in cards):
        chosen = [card for card in cards if card.split == split]
        judged = [card.verdict for card in chosen if card.verdict is not None]
        about = f"{sum(judged)} of the {len(judged)} shown here are right." if judged else ""
        body = "".join(_card(card) for card in chosen)
        title = titles.get(split, f"Prompts: {split}")
        sections.append(section(title, f"<div class=cards>{body}</div>", about))
    return sections


def _card(card: Card) -> str:
    words = {True: "right", False: "wrong", None: ""}
    verdict = words[card.verdict]
    mark = f'<span class="mark {verdict}">{verdict}</span>' if verdict else ""
    seed = f"<span class=muted>seed {card.seed}</span>" if card.seed is not None else ""
    detail = f"<p class=detail>{escape(card.detail)}</p>" if verdict == "wrong" else ""
    return (
        f'<figure class="card {verdict}">{picture_tag(card.image, card.prompt)}'
        f"<figcaption><p>{escape(card.prompt)}</p>{detail}"
        f"<p class=line>{mark}{seed}</p></figcaption></figure>"
    )


def _traces(traces: Sequence[Trace]) -> str:
    figures = []
    for trace in traces:
        of = f" of {trace.tokens}" if trace.tokens else ""
        counts = ", ".join(map(str, trace.changed))
        said = f"Tokens changed at each step{of}: {counts}" if trace.changed else ""
        alt = f"Steps of: {trace.prompt}. {said}".rstrip()
        figures.append(
            f"<figure class=trace><figcaption>{escape(trace.prompt)}</figcaption>"
            f"<div class=wide>{picture_tag(trace.strip, alt)}</div>"
            + (f"<p class=muted>{said}</p>" if said else "")
            + "</figure>"
        )
    counted = any(trace.changed for trace in traces)
    about = "The picture after every step" + (
        ", and below it the token grid: orange where the step changed the token."
        if counted
        else ", or after some of many."
    )
    what = "tokens change" if counted else "a picture comes about"
    body = f"<div class=traces>{''.join(figures)}</div>"
    return section(f"How {what} from first to last step", body, about) if figures else ""


def _curves(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """One chart per quantity; train/x and val/x share one."""
    charts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, points in curves.items():
        line, _, quantity = name.rpartition("/")
        finite = [(float(x), float(y)) for x, y in points if math.isfinite(y)]
        if finite:
            charts.setdefault(quantity, {})[line or quantity] = finite
    body = "".join(
        f"<figure class=chart><figcaption>{escape(quantity)}</figcaption>"
        f"{_chart(quantity, lines)}</figure>"
        for quantity, lines in charts.items()
    )
    title = "Loss curve" if list(charts) == ["loss"] else "Training curves"
    return section(title, f"<div class=charts>{body}</div>") if body else ""


def _chart(
    quantity: str, lines: Mapping[str, list[tuple[float, float]]], over: str = "training steps"
) -> str:
    """An SVG of at most five lines: axes with round numbers, a legend, each line's last value."""
    width, height, left, right, top, bottom = 440, 240, 46, 12, 26, 24
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_ticks, y_ticks = _ticks(min(xs), max(xs), 5), _ticks(min(ys), max(ys), 4)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (width - left - right)
        up = (y - y_low) / ((y_high - y_low) or 1) * (height - top - bottom)
        return left + across, height - bottom - up

    shapes = []
    for tick in y_ticks:
        _, y = at(x_low, tick)
        shapes.append(
            f'<line class=rule x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        shapes.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in (t for t in x_ticks if x_low <= t <= x_high):
        x, _ = at(tick, y_low)
        shapes.append(
            f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{tick:,.10g}</text>'
        )
    place = left
    for i, (name, points) in enumerate(lines.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in _thin(points)))
        shapes.append(f'<polyline class="line c{i % 5}" points="{path}"/>')
        x, y = at(*points[-1])
        shapes.append(f'<circle class="dot c{i % 5}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
        label = f"{name} {_number(points[-1][1])}"
        shapes.append(f'<circle class="dot c{i % 5}" cx="{place + 5}" cy="10" r="4"/>')
        shapes.append(f'<text x="{place + 14}" y="14">{escape(label)}</text>')
        place += 34 + 7 * len(label)
    ends = "; ".join(f"{n} ends at {_number(p[-1][1])}" for n, p in lines.items())
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(f"{quantity} over {over}; {ends}")}">{"".join(shapes)}</svg>'
    )


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers that span low to high."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / count))
    step = next(power * m for m in (1, 2, 5, 10) if power * m * count >= span * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _thin(points: Sequence[tuple[float, float]], most: int = 300) -> list[tuple[float, float]]:
    """Average runs of neighbours so that a line has at most `most` points; ends stay."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) // most)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(sum(x for x, _ in r) / len(r), sum(y for _, y in r) / len(r)) for r in runs]
    return [points[0], *means, points[-1]]


def _reconstructions(given: list[tuple[Picture, Picture]] | Picture | None) -> str:
    if given is None or (isinstance(given, list) and not given):
        return ""
    if not isinstance(given, list):
        body = f"<div class=wide>{picture_tag(given, 'Pictures and their reconstructions')}</div>"
        return section("Reconstructions", body, "What is kept of a picture.")
    pairs = "".join(
        f"<figure class=pair>{picture_tag(real, f'original {i}')}"
        f"{picture_tag(made, f'reconstruction {i}')}</figure>"
        for i, (real, made) in enumerate(given, 1)
    )
    about = "What is kept of a picture: the original left, its reconstruction right."
    return section("Reconstructions", f"<div class=pairs>{pairs}</div>", about)


def _skipped(stages: Mapping[str, Mapping[str, int]]) -> str:
    """What was left out of the training samples, where anything was."""
    rows = [
        [stage, str(counts.get("seen", 0)), reason, str(number)]
        for stage, counts in stages.items()
        for reason, number in sorted(counts.items())
        if reason != "seen"
    ]
    if not rows:
        return ""
    body = html_table(["stage", "samples read", "left out because of", "number"], rows, (1, 3))
    about = "A stage that reads the data several times counts a sample every time."
    return section("Samples left out", body, about)


def _repeat(report: Report) -> str:
    body = f"<pre class=command>{escape(report.command)}</pre>"
    if report.stages:
        total = sum(s.seconds for s in report.stages if not s.reused)
        rows = [
            [s.name, "reused" if s.reused else _duration(s.seconds), s.key] for s in report.stages
        ]
        body += html_table(["stage", "time", "key"], [*rows, ["all", _duration(total), ""]], (1,))
    if report.files:
        body += html_table(["file", "path"], [[name, str(p)] for name, p in report.files.items()])
    return section("Run it again", body)


def _config(report: Report) -> str:
    if not report.config_yaml:
        return ""
    yaml = f"<pre>{escape(report.config_yaml)}</pre>"
    return section("Settings", f"<details><summary>Resolved config</summary>{yaml}</details>")


def html_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()
) -> str:
    """Return a table of plain texts; the columns in `numbers` are aligned to the right."""
    right = set(numbers)

    def cell(tag: str, i: int, text: str) -> str:
        name = " class=number" if i in right else ""
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{scope}{name}>{escape(text)}</{tag}>"

    head = "".join(cell("th", i, text) for i, text in enumerate(heads))
    body = "".join(
        f"<tr>{''.join(cell('td', i, text) for i, text in enumerate(row))}</tr>" for row in rows
    )
    # a box that scrolls must be reachable by keyboard
    return (
        '<div class=wide tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def picture_tag(picture: Picture, alt: str) -> str:
    """Embed a picture; a small one is enlarged by the browser without smoothing."""
    if isinstance(picture, Path):
        with Image.open(picture) as opened:
            image = opened.copy()
    else:
        image = to_image(picture) if isinstance(picture, Tensor) else picture
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    small = " class=small" if min(image.size) <= 128 else ""
    return (
        f'<img{small} src="data:image/png;base64,{data}" alt="{escape(alt)}" '
        f'width="{image.width}" height="{image.height}">'
    )


def _parent(name: str, scores: Mapping[str, Any]) -> str | None:
    """Return the score that `name` is a part of."""
    above = name.rpartition("/")[0]
    return above if above in scores else None


def _companion(name: str, scores: Mapping[str, Any]) -> bool:
    return any(name.endswith(e) and name.removesuffix(e) in scores for e in COMPANIONS)


def _metric(name: str) -> Metric:
    last = name.rpartition("/")[2]
    return METRICS.get(last, Metric(last.replace("_", " ").capitalize(), ""))


def _split(name: str) -> str:
    """Return heldout for eval/heldout/x, val for eval/x and tokenizer for tokenizer/x."""
    head, *between = name.split("/")[:-1] or ["eval"]
    return " ".join(between if head == "eval" else [head, *between]) or "val"


def _shown(name: str, value: Any) -> str:
    """Show a score as its metric wants it."""
    if isinstance(value, int | float) and _metric(name).percent:
        return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"
    return _number(value)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


STYLE = """
:root {
  --ground: #fbfbfa; --box: #ffffff; --ink: #1d2126; --muted: #656c76; --rule: #e3e3df;
  --right: #1a7340; --wrong: #b3331f; --right-ground: #e5f3ea; --wrong-ground: #fbe9e5;
  --c0: #2f6fae; --c1: #c2691c; --c2: #4d8a3c; --c3: #8a56a6; --c4: #7a7a7a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #15171a; --box: #1d2024; --ink: #e4e6e9; --muted: #989fa9; --rule: #31353b;
    --right: #7fd09b; --wrong: #f2917e; --right-ground: #1b3325; --wrong-ground: #3d211c;
    --c0: #74aee6; --c1: #e69a55; --c2: #8fc57c; --c3: #c79be0; --c4: #a0a0a0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 70rem; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 4rem;
  background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  overflow-wrap: break-word;
}
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0.5rem 0 0.25rem; letter-spacing: -0.01em; }
h2 { font-size: 1.2rem; margin: 0 0 0.25rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 0; }
p { margin: 0.25rem 0; }
section { margin-top: 2.75rem; }
.muted { color: var(--muted); }
.notes { margin: 0.75rem 0 0; padding: 0.6rem 1rem 0.6rem 2rem; border-left: 3px solid var(--c1);
  background: var(--box); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr));
  gap: 0.75rem; margin: 0.75rem 0; }
.tile { background: var(--box); border: 1px solid var(--rule); border-radius: 8px;
  padding: 0.8rem 1rem; }
.tile dt { font-weight: 600; }
.tile dd { margin: 0; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
.tile .value { font-size: 2rem; line-height: 1.3; font-weight: 600; letter-spacing: -0.02em; }
.tile .muted { margin-top: 0.35rem; line-height: 1.35; }
.wide { overflow-x: auto; max-width: 100%; margin: 0.75rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.35rem 1.25rem 0.35rem 0; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
th { color: var(--muted); font-weight: 500; }
.number { text-align: right; }
img { display: block; max-width: 100%; height: auto; }
img.small { image-rendering: pixelated; width: 100%; }
figure { margin: 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr));
  gap: 0.75rem; margin-top: 0.75rem; }
.card { background: var(--box); border: 1px solid var(--rule); border-radius: 8px;
  overflow: hidden; font-size: 0.85rem; line-height: 1.4; display: flex; flex-direction: column; }
.card.wrong { border-color: var(--wrong); }
.card figcaption { padding: 0.5rem 0.7rem 0.6rem; display: flex; flex-direction: column; flex: 1; }
.detail { color: var(--wrong); }
.line { display: flex; justify-content: space-between; align-items: center; gap: 0.5rem;
  margin-top: auto; padding-top: 0.4rem; }
.mark { font-weight: 600; padding: 0 0.5rem; border-radius: 1rem; }
.mark.right { color: var(--right); background: var(--right-ground); }
.mark.wrong { color: var(--wrong); background: var(--wrong-ground); }
.traces { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25.5rem), 1fr));
  gap: 1.5rem; margin-top: 0.75rem; }
.trace figcaption, .chart figcaption { font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr));
  gap: 1.25rem; margin-top: 0.75rem; }
.chart { max-width: 40rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 12px; fill: var(--muted); }
.rule { stroke: var(--rule); stroke-width: 1; }
.line.c0, .line.c1, .line.c2, .line.c3, .line.c4 { fill: none; stroke-width: 1.75; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); }
.dot.c0 { fill: var(--c0); } .dot.c1 { fill: var(--c1); } .dot.c2 { fill: var(--c2); }
.dot.c3 { fill: var(--c3); } .dot.c4 { fill: var(--c4); }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr));
  gap: 0.75rem; margin-top: 0.75rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; border-radius: 6px;
  overflow: hidden; }
pre { background: var(--box); border: 1px solid var(--rule); border-radius: 8px; margin: 0.75rem 0;
  padding: 0.75rem 1rem; overflow-x: auto; font: 0.85rem/1.5 ui-monospace, Menlo, Consolas,
  "Liberation Mono", monospace; }
.command { white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; padding: 0.4rem 0; color: var(--c0); }
@media (max-width: 30rem) {
  .cards { grid-template-columns: 1fr 1fr; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 0.5rem; }
  .tile { padding: 0.65rem 0.75rem; }
  .tile .value { font-size: 1.6rem; }
}
@media print { details { display: none; } .card, .trace { break-inside: avoid; } }
"""

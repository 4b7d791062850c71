"""Charts, drawn by matplotlib: lines with intervals, or a map over two settings."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean, median
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from data.files import atomic
from eval.interval import Score
from experiments.report.document import data_url

WIDE = 10  # ratio of the largest to the smallest value from which on an axis may be logarithmic
BANDS = 4  # curves whose intervals are drawn as bands; those of more would hide each other
MOST = 300  # values of a line that are drawn
# every colour on a light ground, and what it becomes on a dark one
INK, RULE = "#4c535b", "#d9dad7"
LINES = ("#2f6fae", "#c2691c", "#4d8a3c", "#8a56a6", "#7a7a7b")
DARK = dict(zip(LINES, ("#74aee6", "#e69a55", "#8fc57c", "#c79be0", "#a0a0a1"), strict=True))
DARK |= {INK: "#b4bac2", RULE: "#3a3f46"}
LOOK: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), RULE),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "axes.prop_cycle": cycler(linestyle=["-", "--", ":"]) * cycler(color=LINES),
    "axes.titlesize": 11,
    "font.size": 10,
    "text.parse_math": False,  # a caption may hold a $
    "svg.hashsalt": "charts",  # the same chart is the same bytes
}


class Value(NamedTuple):
    """One value with its 95 % interval; low and high None where there is none."""

    x: Any
    y: float
    low: float | None = None
    high: float | None = None


def value_of(x: Any, score: Score) -> Value:
    """Return a score at x."""
    return Value(x, score["value"], score.get("low"), score.get("high"))


def lines(
    curves: Mapping[str, Sequence[Value]], *, across: str, up: str, title: str = ""
) -> Figure:
    """Draw a line with its interval per curve, and a legend below where there are several.

    Args:
        curves: label -> values; where an x is no number, all are places in a row.
        across: label of the horizontal axis.
        up: label of the vertical axis.
        title: above the chart.
    """
    every = [v for values in curves.values() for v in values]
    numeric = all(isinstance(v.x, int | float) and not isinstance(v.x, bool) for v in every)
    places = list(dict.fromkeys(str(v.x) for v in every))

    def draw(axes: Axes) -> None:
        for label, values in curves.items():
            values = thinned(values)
            xs = [float(v.x) if numeric else places.index(str(v.x)) for v in values]
            (line,) = axes.plot(xs, [v.y for v in values], label=label, markersize=4)
            line.set_marker("o" if len(values) <= 40 else "")
            # where there is no interval, None becomes NaN and nothing is drawn
            low, high = (np.array([v[i] for v in values], float) for i in (2, 3))
            if numeric and len(curves) <= BANDS:
                axes.fill_between(xs, low, high, color=line.get_color(), alpha=0.18, lw=0)
            else:
                axes.vlines(xs, low, high, color=line.get_color(), lw=1)
            if not numeric:
                line.set_linestyle("")
        if numeric and _in_ratios(sorted({float(v.x) for v in every})):
            axes.set_xscale("log")
        elif numeric:
            axes.locator_params(axis="x", nbins=6)
        else:
            axes.set_xticks(range(len(places)), places)
            axes.margins(x=0.5 / len(places))
        if _in_ratios([v.y for v in every]):
            axes.set_yscale("log")
        axes.grid(axis="y")

    return _figure(draw, across, up, title, legend=len(curves) > 1)


def heatmap(
    values: Mapping[tuple[Any, Any], float], *, across: str, up: str, title: str = ""
) -> Figure:
    """Draw values over two settings as a map with the numbers in its cells.

    Args:
        values: (x, y) -> value; cells without one stay empty.
        across: label of the horizontal axis.
        up: label of the vertical axis.
        title: above the chart.
    """
    xs, ys = (list(dict.fromkeys(key[i] for key in values)) for i in (0, 1))
    middle = (min(values.values()) + max(values.values())) / 2

    def draw(axes: Axes) -> None:
        table = [[values.get((x, y), math.nan) for x in xs] for y in ys]
        axes.imshow(table, cmap="viridis", aspect="auto")
        for (x, y), value in values.items():
            text = axes.text(xs.index(x), ys.index(y), f"{value:.3g}", ha="center", va="center")
            text.set(color="white" if value < middle else "black", size=min(10, 60 / len(xs)))
        axes.set_xticks(range(len(xs)), [str(x) for x in xs])
        axes.set_yticks(range(len(ys)), [str(y) for y in ys])

    return _figure(draw, across, up, title)


def save(path: Path, figure: Figure) -> None:
    """Write a chart as PNG on white; the file appears whole or not at all."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=200, facecolor="white")


def chart_tag(figure: Figure, alt: str) -> str:
    """Embed a chart as SVG on the page's ground, in colours for light and for dark."""
    buffer = io.StringIO()
    with rc_context(LOOK):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    light = dark = buffer.getvalue()
    for colour, instead in DARK.items():
        dark = dark.replace(colour, instead)
    light, dark = (data_url(text.encode(), "image/svg+xml") for text in (light, dark))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(alt)}"></picture>'
    )


def thinned(values: Sequence[Value]) -> Sequence[Value]:
    """Average runs of neighbours so that about MOST values without intervals remain; ends stay."""
    if len(values) <= MOST:
        return values
    size = -(-len(values) // MOST)
    runs = [values[i : i + size] for i in range(0, len(values), size)]
    means = [Value(fmean(v.x for v in run), fmean(v.y for v in run)) for run in runs]
    return [values[0], *means, values[-1]]


def _figure(
    draw: Callable[[Axes], None], across: str, up: str, title: str, legend: bool = False
) -> Figure:
    """Make a figure for a phone's width, higher by the rows of its legend."""
    with rc_context(LOOK):
        figure = Figure((4.4, 2.9), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set(xlabel=across, ylabel=up, title=title)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":  # plain numbers, where matplotlib writes powers of ten
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axis.set_minor_locator(NullLocator())
        if legend:
            handles, labels = axes.get_legend_handles_labels()
            columns = max(1, min(len(labels), 54 // (max(map(len, labels)) + 7)))
            labels = [fill(label, 44) for label in labels]
            rows = sum(1 + label.count("\n") for label in labels) / columns
            figure.set_figheight(2.9 + 0.2 * math.ceil(rows))
            figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _in_ratios(values: Sequence[float]) -> bool:
    """Say whether values span much and lie in equal ratios rather than in equal steps."""
    low, middle, high = min(values), median(values), max(values)
    if low <= 0 or high < WIDE * low:
        return False
    return abs(middle - math.sqrt(low * high)) < abs(middle - (low + high) / 2)

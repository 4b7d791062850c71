"""Charts of many runs as PNG: a score against one setting, or as a map over two."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from PIL import Image

from experiments.pictures import save_png

SIZE, DPI = (6.4, 4.2), 120
WIDE = 20  # ratio of the largest to the smallest value from which on the axis is logarithmic


class Point(NamedTuple):
    """One value with its 95 % interval; low and high None where there is none."""

    x: Any
    value: float
    low: float | None = None
    high: float | None = None


def lines(
    path: Path, curves: Mapping[str, Sequence[Point]], *, across: str, up: str, title: str = ""
) -> None:
    """Draw a line with its interval per curve.

    Args:
        path: the PNG.
        curves: label -> points; where an x is no number, all are places in a row.
        across: label of the horizontal axis.
        up: label of the vertical axis.
        title: above the chart.
    """
    figure = Figure(SIZE, dpi=DPI, layout="constrained")
    axes = figure.subplots()
    numeric = all(_is_number(p.x) for points in curves.values() for p in points)
    places = list(dict.fromkeys(str(p.x) for points in curves.values() for p in points))
    for label, points in curves.items():
        xs = [float(p.x) if numeric else float(places.index(str(p.x))) for p in points]
        known = [
            (x, p.low, p.high)
            for x, p in zip(xs, points, strict=True)
            if p.low is not None and p.high is not None
        ]
        (line,) = axes.plot(xs, [p.value for p in points], "o-" if numeric else "o", label=label)
        where, low, high = ([row[i] for row in known] for i in range(3))
        if numeric:
            axes.fill_between(where, low, high, color=line.get_color(), alpha=0.15)
        else:
            axes.vlines(where, low, high, color=line.get_color())
    if not numeric:
        axes.set_xticks(range(len(places)), places)
    axes.set(xlabel=across, ylabel=up, title=title)
    values = [p.value for points in curves.values() for p in points]
    if min(values) > 0 and max(values) > WIDE * min(values):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    _save(figure, path)


def heat(
    path: Path,
    values: Mapping[tuple[Any, Any], float],
    *,
    across: str,
    up: str,
    title: str = "",
) -> None:
    """Draw values over two settings as a map with the numbers in its cells.

    Args:
        path: the PNG.
        values: (x, y) -> value; cells without one stay empty.
        across: label of the horizontal axis.
        up: label of the vertical axis.
        title: above the chart.
    """
    xs, ys = (list(dict.fromkeys(key[i] for key in values)) for i in (0, 1))
    table = [[values.get((x, y), float("nan")) for x in xs] for y in ys]
    figure = Figure(SIZE, dpi=DPI, layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(table, cmap="viridis", aspect="auto")
    middle = (min(values.values()) + max(values.values())) / 2
    for (x, y), value in values.items():
        ink = "white" if value < middle else "black"
        axes.text(xs.index(x), ys.index(y), f"{value:.3g}", ha="center", va="center", color=ink)
    axes.set_xticks(range(len(xs)), [str(x) for x in xs])
    axes.set_yticks(range(len(ys)), [str(y) for y in ys])
    axes.set(xlabel=across, ylabel=up, title=title)
    figure.colorbar(shown)
    _save(figure, path)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    with Image.open(buffer) as image:
        save_png(path, image.convert("RGB"))

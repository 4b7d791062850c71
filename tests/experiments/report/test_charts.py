"""Charts: intervals, logarithmic axes, legends that hide nothing, both grounds."""

import base64
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from experiments.report import charts
from experiments.report.charts import Value


def drawings(figure: Figure) -> tuple[str, str]:
    """The SVG for light and the one for dark."""
    tag = charts.chart_tag(figure, "a & b")
    assert 'alt="a &amp; b"' in tag
    dark, light = (base64.b64decode(data).decode() for data in re.findall(r"base64,([^\"]+)", tag))
    for text in (light, dark):
        assert ElementTree.fromstring(text).tag.endswith("svg")
    return light, dark


def test_both_grounds_have_colours_of_their_own_and_the_same_bytes_every_time() -> None:
    curves = {name: [Value(1, 2.0, 1.0, 3.0), Value(2, 3.0)] for name in "ab"}
    light, dark = drawings(charts.lines(curves, across="x", up="y"))
    for colour, instead in charts.DARK.items():
        assert colour not in dark and instead not in light
        assert light.count(colour) == dark.count(instead)
    assert charts.LINES[1] in light and charts.INK in light and charts.RULE in light
    assert "fill: #ffffff" not in light  # the ground is the page's
    assert drawings(charts.lines(curves, across="x", up="y")) == (light, dark)


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1, 2, 4, 8, 16], "log"),
        ([0.3, 0.4, 0.5, 7.0], "log"),
        ([1, 2, 4, 8], "linear"),  # too near to each other
        ([1, 5000, 10000], "linear"),  # equal steps
        ([0, 1, 10, 100], "linear"),
        ([-1, 1, 10, 100], "linear"),
    ],
)
def test_an_axis_is_logarithmic_where_values_lie_in_ratios(values: list, scale: str) -> None:
    (axes,) = charts.lines({"a": [Value(v, v) for v in values]}, across="", up="").axes
    assert (axes.get_xscale(), axes.get_yscale()) == (scale, scale)
    if scale == "log":  # plain numbers
        labels = [text.get_text() for text in axes.get_yticklabels()]
        assert "1" in labels and not any("$" in label or "^" in label for label in labels)


def test_the_legend_covers_no_curve_and_fits_the_chart() -> None:
    curves = {
        f"setting={i} of a rather long name={i}" * 2: [Value(0, i), Value(1, i)] for i in "ab"
    }
    curves = {name: [Value(v.x, float(ord(v.y))) for v in line] for name, line in curves.items()}
    figure = charts.lines(curves, across="x", up="y")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, (axes,) = legend.get_window_extent(), figure.axes
    assert box.y1 <= axes.get_tightbbox().y0 + 1
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0
    assert not charts.lines({"a": [Value(0, 1.0)]}, across="x", up="y").legends


def test_intervals_are_bands_and_those_of_many_curves_bars() -> None:
    def parts(count: int, x: list) -> list[str]:
        line = [Value(x[0], 1.0, 0.5, 1.5), Value(x[1], 2.0)]
        figure = charts.lines({str(i): line for i in range(count)}, across="", up="")
        return [type(part).__name__ for part in figure.axes[0].collections]

    assert parts(2, [0, 1]) == ["FillBetweenPolyCollection"] * 2
    assert parts(charts.BANDS + 1, [0, 1]) == ["LineCollection"] * (charts.BANDS + 1)
    assert parts(1, ["a", "b"]) == ["LineCollection"]


def test_places_stand_in_a_row_without_a_line() -> None:
    (axes,) = charts.lines({"a": [Value("ae", 1.0), Value(True, 2.0)]}, across="", up="").axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["ae", "True"]
    assert axes.lines[0].get_linestyle() == "None"


def test_a_long_line_is_thinned_and_keeps_its_ends_and_its_mean() -> None:
    line = [Value(i, math.sin(i)) for i in range(5000)]
    thin = charts.thinned(line)
    assert len(thin) <= charts.MOST + 2 and (thin[0], thin[-1]) == (line[0], line[-1])
    means = [v.y for v in thin[1:-1]]
    assert sum(means) / len(means) == pytest.approx(sum(v.y for v in line) / 5000, abs=1e-3)
    assert charts.thinned(line[:300]) == line[:300]


def test_a_map_shows_its_numbers_and_leaves_gaps() -> None:
    values = {("1", "a"): 0.25, ("2", "a"): 0.5, ("1", "b"): 0.75}
    (axes,) = charts.heatmap(values, across="x", up="y", title="$t$").axes
    found = {text.get_position(): text.get_text() for text in axes.texts}
    assert found == {(0, 0): "0.25", (1, 0): "0.5", (0, 1): "0.75"}
    assert axes.images[0].get_array().mask.tolist() == [[False, False], [False, True]]
    drawings(charts.heatmap(values, across="$x", up="y", title="$t$ $"))  # no formula


def test_a_file_has_a_white_ground(tmp_path: Path) -> None:
    charts.save(tmp_path / "a" / "x.png", charts.lines({"a": [Value(0, 1.0)]}, across="", up=""))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.png"]
    with Image.open(tmp_path / "a" / "x.png") as image:
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)

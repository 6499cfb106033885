"""Tests of the line charts as inline SVG."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

from kvcore.monitoring.line_chart import HEIGHT, WIDTH, line_chart


def curves(chart: str) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in points.split())]
        for points in re.findall(r'<polyline class="[^"]*" points="([^"]*)"', chart)
    ]


def ticks(chart: str, anchor: str) -> list[str]:
    return re.findall(rf'text-anchor="{anchor}">([^<]*)<', chart)


def test_points_are_ordered_by_step_and_value_inside_the_chart() -> None:
    (points,) = curves(line_chart("Loss", {"train": [(1, 8.0), (50, 2.0), (100, 4.0)]}))
    (x0, y0), (x1, y1), (x2, y2) = points
    assert 0 < x0 < x1 < x2 <= WIDTH
    assert 0 < y0 < y2 < y1 < HEIGHT


def test_value_axis_starts_at_zero_or_below_with_round_ticks() -> None:
    chart = line_chart("Loss", {"train": [(1, 8.1), (64, 2.2)]})
    assert ticks(chart, "end") == ["0", "2.5", "5", "7.5"]
    assert ticks(chart, "middle") == ["20", "40", "60"]
    assert ticks(line_chart("Loss", {"a": [(1, -1.0), (2, 3.0)]}), "end") == ["-1", "0", "1", "2", "3"]
    assert ticks(line_chart("Weights", {"a": [(1, 0.1)]}, top=1.0), "end") == ["0", "0.25", "0.5", "0.75", "1"]


def test_step_ticks_are_whole_numbers() -> None:
    assert ticks(line_chart("Loss", {"a": [(3, 1.0), (5, 1.0)]}), "middle") == ["3", "4", "5"]
    assert ticks(line_chart("Loss", {"a": [(3, 0.0)]}), "middle") == ["3"]


def test_non_finite_values_are_omitted() -> None:
    chart = line_chart("Loss", {"a": [(1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0)], "b": [(1, math.nan)]})
    ((first, last),) = curves(chart)
    assert first[0] < last[0]
    assert "nan" not in chart
    assert "No value yet." in line_chart("Loss", {"b": [(1, math.nan)]})
    assert "No value yet." in line_chart("Loss", {})


def test_a_long_curve_is_thinned_but_keeps_its_first_and_last_points() -> None:
    (points,) = curves(line_chart("Loss", {"a": [(step, step) for step in range(1, 2001)]}))
    assert 200 < len(points) <= 301
    assert points[0][0] < 50
    assert points[-1][0] == WIDTH - 10


def test_names_are_escaped_and_aria_label_states_the_last_values() -> None:
    chart = line_chart("<b>Loss</b>", {"<script>": [(1, 0.5)], "b": [(1, 1234.5)]})
    figure = ET.fromstring(chart)
    assert figure.findtext("h3") == "<b>Loss</b>"
    picture = figure.find("svg")
    assert picture is not None
    assert picture.get("aria-label") == "<b>Loss</b>: <script> 0.5 at step 1; b 1,234 at step 1"
    assert [entry.get("class") for entry in figure.iter("i")] == ["c0", "c1"]


def test_more_curves_than_colours_are_distinguished_by_dashes() -> None:
    chart = line_chart("Weights", {f"teacher{place}": [(1, 0.1), (2, 0.1)] for place in range(8)})
    kinds = re.findall(r'<polyline class="([^"]*)"', chart)
    assert len(set(kinds)) == 8
    assert kinds[6] == "c0 dashed"

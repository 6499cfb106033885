"""Charts of live pages, which `static/charts.js` draws with uPlot in the browser."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Points = Sequence[tuple[float, float]]
# More points of a curve than this cannot be told apart.
MOST_POINTS = 400

STYLE = """
.chart-block .charts { display: grid; gap: 1rem 1.5rem; }
.chart-block .charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
.chart { margin: 0; min-width: 0; }
.chart figcaption { overflow-wrap: anywhere; font-size: .9rem; font-variant-numeric: tabular-nums; min-height: 1.4rem; }
.chart figcaption b { color: var(--ink); font-weight: 600; } .at { color: var(--soft); font-weight: 400; }
.key, .mark { display: inline-block; margin-right: .7rem; overflow-wrap: anywhere; }
.key i { display: inline-block; width: 1rem; vertical-align: middle; margin-right: .3rem; }
.key i { border-top: 3px solid var(--shade); } .key .dashed { border-top-style: dashed; }
.controls { display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: center; max-width: none; font-size: .9rem; }
@media (pointer: coarse) { .mouse { display: none; } }
.controls { color: var(--soft); } .controls select { font: inherit; background: var(--ground); color: var(--ink); }
.mark { margin: 0; } .mark i { display: inline-block; margin-right: .3rem; vertical-align: middle; height: .5rem; }
.mark .best { border: .3rem solid transparent; border-bottom: .5rem solid var(--good); border-top: 0; height: 0; }
.mark .checkpoint { width: .5rem; background: var(--soft); }
.mark .failover { height: .9rem; border-left: 2px dotted var(--bad); }
"""


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over steps or over time.

    Attributes:
        title: shown above.
        curves: by name, points (x, value) with ascending x: a step, or Unix seconds. Values that are not finite are
            left out, and so are curves without any other value.
        unit: `%` for shares of 1, or what follows each number.
        lines: levels to compare with, and what they mean.
        top: the upper end of the axis; the highest value by default. The lower end is 0 or the lowest negative value.
    """

    title: str
    curves: Mapping[str, Points]
    unit: str = ""
    lines: tuple[tuple[float, str], ...] = ()
    top: float | None = None


EventKind = Literal["best", "checkpoint", "failover"]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened after a step, marked in every chart. `text`: shown near it."""

    step: int
    kind: EventKind
    text: str


def chart_block(charts: Iterable[Chart], events: Sequence[Event] = (), *, time: bool = False) -> str:
    """The charts side by side, as many as the width allows. Charts without a value are left out.

    Args:
        charts: all over the same x.
        events: marked in all of them.
        time: whether x is Unix seconds instead of steps. Charts over steps can be smoothed and logarithmic.
    """
    drawn = [one for one in (_content(chart, time=time) for chart in charts) if one["curves"]]
    marks = [{"step": event.step, "kind": event.kind, "text": event.text} for event in events]
    data = json.dumps({"charts": drawn, "events": marks, "controls": not time}, allow_nan=False)
    # The text of a script element ends at the first `</script`.
    inside = data.replace("<", "\\u003c")
    return (
        f'<section class="chart-block"><script type="application/json">{inside}</script>'
        "<noscript><p>The charts need JavaScript.</p></noscript></section>"
    )


def _content(chart: Chart, *, time: bool) -> dict[str, Any]:
    curves = {name: _thinned([one for one in points if math.isfinite(one[1])]) for name, points in chart.curves.items()}
    return {
        "title": chart.title,
        "unit": chart.unit,
        "lines": chart.lines,
        "top": chart.top,
        "time": time,
        "curves": [
            {"name": name, "colour": place, "x": [x for x, _ in points], "y": [float(f"{y:.5g}") for _, y in points]}
            for place, (name, points) in enumerate(curves.items())
            if points
        ],
    }


def _thinned(points: Points) -> Points:
    """Every n-th point and the last one."""
    stride = math.ceil(len(points) / MOST_POINTS) or 1
    return [*points[:-1:stride], points[-1]] if points else points

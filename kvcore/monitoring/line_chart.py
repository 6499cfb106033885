"""Line charts as inline SVG, in the colours of the surrounding page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 380, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 24
_COLOURS = 6
_MOST_POINTS = 300
_TICKS = 4

STYLE = """
:root { --c0: #0969da; --c1: #bc4c00; --c2: #1a7f37; --c3: #8250df; --c4: #a0306f; --c5: #57606a; }
@media (prefers-color-scheme: dark) {
  :root { --c0: #58a6ff; --c1: #f0883e; --c2: #3fb950; --c3: #bc8cff; --c4: #ff7bac; --c5: #9aa4af; }
}
.chart { margin: 0; min-width: 0; } .chart svg { width: 100%; height: auto; display: block; }
.chart figcaption { overflow-wrap: anywhere; font-size: .9rem; }
.chart text { fill: var(--soft); font: 11px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
.chart line { stroke: var(--line); } .chart polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.key { display: inline-block; margin-right: .7rem; overflow-wrap: anywhere; }
.key i { display: inline-block; width: 1rem; vertical-align: middle; margin-right: .3rem; }
.key i { border-top: 3px solid var(--shade); }
.key .dashed { border-top-style: dashed; }
polyline.dashed { stroke-dasharray: 5 4; }
""" + "\n".join(f".c{place} {{ --shade: var(--c{place}); stroke: var(--shade); }}" for place in range(_COLOURS))


def line_chart(title: str, curves: Mapping[str, Points], top: float | None = None) -> str:
    """A figure of curves over steps, with a legend that shows their last values.

    Args:
        title: shown above the chart.
        curves: by name, points (step, value) with ascending steps. Points with a value that is not finite are left out.
        top: the upper end of the axis; the highest value by default. The lower end is 0 or the lowest negative value.
    """
    shown = {name: _thinned([one for one in points if math.isfinite(one[1])]) for name, points in curves.items()}
    shown = {name: points for name, points in shown.items() if points}
    summary = "; ".join(f"{name} {number(points[-1][1])} at step {points[-1][0]:g}" for name, points in shown.items())
    picture = _draw(list(shown.values()), top) if shown else ""
    legend = "".join(_key(place, name, points[-1][1]) for place, (name, points) in enumerate(shown.items()))
    label = escape(f"{title}: {summary or 'no value yet'}")
    return (
        f'<figure class="chart"><h3>{escape(title)}</h3>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{picture}</svg><figcaption>{legend or 'No value yet.'}</figcaption></figure>\n"
    )


def number(value: float) -> str:
    """Formats a number with about three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def key(kind: str, text: str) -> str:
    """An entry of a legend; `kind`: the CSS class of its curve."""
    return f'<span class="key"><i class="{kind}"></i>{escape(text)}</span> '


def _kind(place: int) -> str:
    return f"c{place % _COLOURS}{' dashed' if place // _COLOURS % 2 else ''}"


def _key(place: int, name: str, last: float) -> str:
    return key(_kind(place), f"{name} {number(last)}")


def _thinned(points: Points) -> Points:
    """Every n-th point and the last one, so that there are at most about 300."""
    stride = math.ceil(len(points) / _MOST_POINTS) or 1
    return [*points[:-1:stride], points[-1]] if points else points


def _draw(curves: Sequence[Points], top: float | None) -> str:
    steps = [step for points in curves for step, _ in points]
    values = [value for points in curves for _, value in points]
    first, last = min(steps), max(steps)
    low, high = min(0.0, *values), max(values) if top is None else top
    x_ticks, y_ticks = _ticks(first, last, least=1.0), _ticks(low, high)
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])

    def x(step: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (step - first) / (last - first or 1)

    def y(value: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (value - low) / (high - low or 1)

    grid = [
        f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="{_LEFT - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        for tick in y_ticks
    ]
    below = [f'<text x="{x(tick):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{tick:,.0f}</text>' for tick in x_ticks]
    paths = (" ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points) for points in curves)
    lines = [f'<polyline class="{_kind(place)}" points="{path}"/>' for place, path in enumerate(paths)]
    return "".join((*grid, *below, *lines))


def _ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """A few round numbers from `low` to `high`, at least `least` apart."""
    if high <= low:
        return [low]
    raw = max((high - low) / _TICKS, least)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    return [round(place * step, 12) for place in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]

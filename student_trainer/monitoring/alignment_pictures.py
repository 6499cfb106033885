"""The pictures of the alignment report, as PNG, drawn by matplotlib without a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from align.head_dim_adapter import LEAST_EXPLAINED
from student_trainer.monitoring.chart_style import Theme, rendered, style

Report = Mapping[str, Any]

SIDES = {"k": "keys", "v": "values"}
# Bars end here: a map below it is worse than the mean, however far.
LOWEST_SHOWN = -0.5
# More cells, or bars, than this carry no number.
_MOST_CELLS, _MOST_BARS = 128, 8
_MOST_OF = 20
# Widths in inches that a window shows at a legible size.
WIDE, NARROW = 9.3, 4.6


@dataclass(frozen=True, slots=True)
class Look:
    """How to draw a picture: its colours, and its greatest width in inches."""

    theme: Theme
    widest: float


def draw_layer_map(report: Report, look: Look) -> bytes | None:
    """Weights of the teacher's layers in each student layer; None if the map is not known."""
    mapping: dict[str, list[list[float]]] | None = report["layer_map"]
    if mapping is None:
        return None
    weights = [[0.0] * report["teacher"]["layers"] for _ in mapping]
    for s, row in mapping.items():
        for t, weight in row:
            weights[int(s)][int(t)] = weight
    with rc_context(style(look.theme)):
        figure, (axes,) = _figure(look, 1, *_heat_size(look, weights))
        _heat(axes, weights, "Weight of each teacher layer", look.theme, look.theme.series[0])
        return rendered(figure, "png")


def draw_similarity(report: Report, look: Look) -> bytes | None:
    """CKA of every pair of layers for keys and values, with the mapped layers framed; None if not measured."""
    cka: dict[str, list[list[float | None]]] | None = report["cka"]
    if cka is None or report["layer_map"] is None:
        return None
    with rc_context(style(look.theme)):
        width, height = _heat_size(look, cka["k"])
        figure, sides = _figure(look, 2, width, height)
        for axes, (tensor, name) in zip(sides, SIDES.items(), strict=True):
            values = [[math.nan if value is None else value for value in row] for row in cka[tensor]]
            _heat(axes, values, f"Linear CKA of {name}, mapped layers framed", look.theme, look.theme.series[2])
            for s, row in report["layer_map"].items():
                corner, edge = (row[0][0] - 0.5, int(s) - 0.5), look.theme.series[1]
                frame = Rectangle(corner, 1, 1, fill=False, edgecolor=edge, linewidth=2)
                axes.add_patch(frame)
        return rendered(figure, "png")


def draw_explained(report: Report, look: Look) -> bytes | None:
    """Explained variance by student layer, with its shuffled control; None if nothing is fitted."""
    true, control = report["explained_variance"], report["explained_variance_shuffled"]
    if not true["k"]:
        return None
    with rc_context(style(look.theme)):
        figure, sides = _figure(look, 2, _within(look, 0.3 * len(true["k"]) + 2), 3.4)
        for axes, (tensor, name) in zip(sides, SIDES.items(), strict=True):
            _bars(axes, true[tensor], -0.2, look.theme, 0, "paired tokens")
            _bars(axes, control[tensor], 0.2, look.theme, 1, "another sample's (control)")
            label = f"warning below {LEAST_EXPLAINED:g}"
            axes.axhline(LEAST_EXPLAINED, color=look.theme.ink, linestyle="--", linewidth=1, label=label)
            axes.axhline(0.0, color=look.theme.ink, linewidth=0.8)
            known = [value for value in (*true[tensor], *control[tensor]) if value is not None]
            lowest = max(LOWEST_SHOWN, min([0.0, *known]))
            axes.set_ylim(lowest - 0.1 if lowest < 0 else 0.0, 1.12)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlim(-0.6, len(true[tensor]) - 0.4)
            axes.set_xlabel("student layer")
            axes.set_ylabel("explained variance")
            axes.set_title(f"Explained variance of {name}, held-out samples")
        figure.legend(
            *sides[0].get_legend_handles_labels(), loc="outside lower center", ncols=_columns(look, 3), frameon=False
        )
        return rendered(figure, "png")


def draw_coverage(report: Report, look: Look) -> bytes | None:
    """The share of tokens and slots with a counterpart; None if not measured."""
    coverage: dict[str, dict[str, int]] | None = report["coverage"]
    if coverage is None:
        return None
    names = [name.replace("_", " ") for name in coverage]
    shares = [count["paired"] / count["seen"] if count["seen"] else 0.0 for count in coverage.values()]
    paired, rest = look.theme.series[0], look.theme.faint
    with rc_context(style(look.theme)):
        figure, (axes,) = _figure(look, 1, min(6.4, look.widest), 1.9)
        axes.barh(names, shares, color=paired, height=0.55, label="with counterpart")
        axes.barh(
            names, [1.0 - share for share in shares], left=shares, color=rest, height=0.55, label="without counterpart"
        )
        for row, count in enumerate(coverage.values()):
            axes.text(1.02, row, f"{ratio(count)}\n{count['paired']:,} of {count['seen']:,}", va="center", fontsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_title("Tokens with a counterpart")
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        return rendered(figure, "png")


def ratio(count: Mapping[str, int]) -> str:
    """The share of tokens with a counterpart in small numbers, such as `3 of 13`: about the share of each text."""
    share = Fraction(count["paired"], count["seen"]).limit_denominator(_MOST_OF) if count["seen"] else Fraction(0)
    if count["paired"] == count["seen"]:
        return "all"
    return f"{share.numerator} of {share.denominator}" if share else f"fewer than 1 of {_MOST_OF}"


def _within(look: Look, inches: float) -> float:
    """Limits a width in inches to what the page shows at full size."""
    return min(look.widest, max(WIDE / 2, inches))


def _columns(look: Look, most: int) -> int:
    """How many entries of a legend are side by side."""
    return most if look.widest == WIDE else 1


def _figure(look: Look, count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Axes of this size side by side, or one above the other if they are too wide."""
    columns = count if count * width <= look.widest else 1
    rows = count // columns
    figure = Figure(figsize=(columns * width, rows * height), dpi=120, layout="constrained")
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


def _heat_size(look: Look, values: Sequence[Sequence[Any]]) -> tuple[float, float]:
    """Width and height in inches with room for every cell, within limits."""
    return _within(look, 0.42 * len(values[0]) + 1.8), min(7.0, max(2.4, 0.42 * len(values) + 1.2))


def _heat(axes: Axes, values: Sequence[Sequence[float]], title: str, theme: Theme, colour: str) -> None:
    shades = LinearSegmentedColormap.from_list(colour, [theme.ground, colour])
    image = axes.imshow(values, cmap=shades, vmin=0.0, vmax=1.0, aspect="auto")
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=axes)
    axes.set_xlabel("teacher layer")
    axes.set_ylabel("student layer")
    axes.set_title(title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(values) * len(values[0]) > _MOST_CELLS:
        return
    for s, row in enumerate(values):
        for t, value in enumerate(row):
            if value > 0:
                ink = theme.ground if value > 0.6 else theme.ink
                axes.text(t, s, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)


def _bars(axes: Axes, values: Sequence[float | None], offset: float, theme: Theme, series: int, label: str) -> None:
    colour = theme.series[series]
    known = [(layer, value) for layer, value in enumerate(values) if value is not None]
    axes.bar([layer + offset for layer, _ in known], [value for _, value in known], 0.38, color=colour, label=label)
    if len(values) > _MOST_BARS:
        return
    for layer, value in known:
        place, below = max(value, LOWEST_SHOWN), value <= -0.005
        axes.text(
            layer + offset,
            place,
            f"{value if below else abs(value):.2f}",
            ha="center",
            va="top" if below else "bottom",
            color=colour,
            fontsize=8,
            # Readable in front of the threshold line.
            bbox={"facecolor": theme.ground, "edgecolor": "none", "pad": 0.5},
        )

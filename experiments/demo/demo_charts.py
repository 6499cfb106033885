"""The demo's charts, drawn by matplotlib without a display, for light and for dark surroundings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.demo.demo_config import ArmName
from experiments.demo.results import Curve, Results
from kvdistill.report.chart_style import DARK, LIGHT, Theme, draw

Chart = Callable[[Axes, Results, Theme], None]

THEMES: dict[Literal["light", "dark"], Theme] = {"light": LIGHT, "dark": DARK}
_PLACES: dict[ArmName, int] = {"kv_two_teachers": 0, "kv_one_teacher": 2, "no_kv": 5, "shuffled_kv": 1}


def _colour(theme: Theme, arm: ArmName) -> str:
    return theme.series[_PLACES[arm]]


def draw_accuracy(axes: Axes, results: Results, theme: Theme) -> None:
    """Accuracy of each arm, one dot a seed, against chance."""
    names = list(results.arms)
    means = [sum(results.arms[name].accuracy) / len(results.arms[name].accuracy) for name in names]
    axes.barh(names, means, color=[_colour(theme, name) for name in names], height=0.6)
    for row, name in enumerate(names):
        seeds = results.arms[name].accuracy
        if len(seeds) > 1:
            axes.plot(seeds, [row] * len(seeds), "o", color=theme.ink, markersize=4)
        axes.text(max(*seeds, means[row]) + 0.02, row, f"{means[row]:.1%}", va="center")
    axes.axvline(results.chance, color=theme.ink, linestyle="--", linewidth=1)
    axes.text(results.chance + 0.01, -0.62, f"chance {results.chance:.1%}", fontsize="small")
    axes.set_ylim(len(names) - 0.5, -0.9)
    axes.set_xlim(0, 1.15)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("Accuracy on held-out test items")


def draw_learning(axes: Axes, results: Results, theme: Theme) -> None:
    """Validation accuracy over steps."""
    curves: dict[ArmName, Curve] = {name: arm.accuracy_curve for name, arm in results.arms.items()}
    _curves(axes, curves, theme)
    axes.axhline(results.chance, color=theme.ink, linestyle="--", linewidth=1)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("Accuracy on validation items")


def draw_kv_loss(axes: Axes, results: Results, theme: Theme) -> None:
    """The normalised KV loss over steps."""
    curves: dict[ArmName, Curve] = {name: arm.kv_loss_curve for name, arm in results.arms.items()}
    _curves(axes, curves, theme)
    axes.axhline(1.0, color=theme.ink, linestyle="--", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_title("KV loss in training (1.0: predicting the mean)")


def draw_costs(axes: Axes, results: Results, theme: Theme) -> None:
    """Bytes that travelled per sample against the teachers' whole caches."""
    sent, raw = results.bytes_per_sample, results.raw_bf16_bytes_per_sample
    colors = [_colour(theme, "kv_two_teachers"), _colour(theme, "no_kv")]
    axes.barh(["sent", "whole bf16 cache"], [sent, raw], color=colors, height=0.6)
    for row, value in enumerate((sent, raw)):
        axes.text(value + raw * 0.02, row, f"{value:,.0f}", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, max(sent, raw) * 1.25)
    axes.set_title("Bytes per sample, both teachers")


def draw_stages(axes: Axes, results: Results, theme: Theme) -> None:
    """Where the time of one request goes, and what of it the training thread waited for."""
    names = list(results.stages_ms)
    values = [results.stages_ms[name] for name in names]
    colors = [_colour(theme, "shuffled_kv" if name == "stall" else "kv_two_teachers") for name in names]
    axes.barh(names, values, color=colors, height=0.6)
    for row, value in enumerate(values):
        axes.text(value + max(values) * 0.02, row, f"{value:.1f}", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, max(values, default=1.0) * 1.25 or 1.0)
    axes.set_title(f"Milliseconds per request (stall: {results.stall_fraction:.1%} of the time)")


CHARTS: dict[str, Chart] = {
    "Accuracy by arm": draw_accuracy,
    "Validation accuracy over steps": draw_learning,
    "KV loss over steps": draw_kv_loss,
    "Bytes per sample": draw_costs,
    "Time per request by stage": draw_stages,
}


def draw_picture(results: Results) -> bytes:
    """All charts on one light PNG."""

    def fill(figure: Figure, theme: Theme) -> None:
        places = figure.subplot_mosaic([["0", "0"], ["1", "2"], ["3", "4"]])
        for number, chart in enumerate(CHARTS.values()):
            chart(places[str(number)], results, theme)
        figure.suptitle("kvdistill demo: reasoning in latents, taught by K/V", fontweight="bold")

    return draw(fill, LIGHT, (12, 12), "png")


def draw_chart(chart: Chart, results: Results, theme: Theme) -> bytes:
    """One chart as SVG."""
    return draw(lambda figure, theme: chart(figure.subplots(), results, theme), theme, (5.4, 3.4), "svg")


def _curves(axes: Axes, curves: dict[ArmName, Curve], theme: Theme) -> None:
    for name, curve in curves.items():
        if curve.steps:
            style = "--" if name == "shuffled_kv" else "-"
            axes.plot(curve.steps, curve.values, style, color=_colour(theme, name), label=name)
    axes.set_xlabel("step")
    if axes.get_lines():
        axes.legend(frameon=False, fontsize="small")

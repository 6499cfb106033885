"""The demo's charts, drawn by matplotlib without a display, for light and for dark surroundings."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.demo.results import Curve, Results
from experiments.demo.settings import ArmName

Chart = Callable[[Axes, Results, "Theme"], None]


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of one surrounding."""

    ground: str
    ink: str
    faint: str
    arms: dict[ArmName, str]


THEMES: dict[Literal["light", "dark"], Theme] = {
    "light": Theme(
        "#ffffff",
        "#1b1f24",
        "#c9d1d9",
        {"kv_two_teachers": "#0b62a4", "kv_one_teacher": "#1a936f", "no_kv": "#8a8f98", "shuffled_kv": "#c8553d"},
    ),
    "dark": Theme(
        "#14181d",
        "#e6edf3",
        "#3d444d",
        {"kv_two_teachers": "#5cb3ff", "kv_one_teacher": "#4fd1a1", "no_kv": "#9aa4af", "shuffled_kv": "#ff8a70"},
    ),
}


def draw_accuracy(axes: Axes, results: Results, theme: Theme) -> None:
    """Accuracy of each arm, one dot a seed, against chance."""
    names = list(results.arms)
    means = [sum(results.arms[name].accuracy) / len(results.arms[name].accuracy) for name in names]
    axes.barh(names, means, color=[theme.arms[name] for name in names], height=0.6)
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
    colors = [theme.arms["kv_two_teachers"], theme.arms["no_kv"]]
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
    colors = [theme.arms["shuffled_kv" if name == "stall" else "kv_two_teachers"] for name in names]
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
    theme = THEMES["light"]
    with rc_context(_style(theme)):
        figure = Figure(figsize=(12, 12), layout="constrained")
        places = figure.subplot_mosaic([["0", "0"], ["1", "2"], ["3", "4"]])
        for number, chart in enumerate(CHARTS.values()):
            chart(places[str(number)], results, theme)
        figure.suptitle("kvdistill demo: reasoning in latents, taught by K/V", fontweight="bold")
        return _bytes(figure, "png")


def draw_chart(chart: Chart, results: Results, theme: Theme) -> bytes:
    """One chart as SVG."""
    with rc_context(_style(theme)):
        figure = Figure(figsize=(5.4, 3.4), layout="constrained")
        chart(figure.subplots(), results, theme)
        return _bytes(figure, "svg")


def _curves(axes: Axes, curves: dict[ArmName, Curve], theme: Theme) -> None:
    for name, curve in curves.items():
        if curve.steps:
            style = "--" if name == "shuffled_kv" else "-"
            axes.plot(curve.steps, curve.values, style, color=theme.arms[name], label=name)
    axes.set_xlabel("step")
    if axes.get_lines():
        axes.legend(frameon=False, fontsize="small")


def _style(theme: Theme) -> dict[Any, Any]:
    return {
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": theme.ground,
        "axes.facecolor": theme.ground,
        "savefig.facecolor": theme.ground,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.edgecolor": theme.faint,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "svg.hashsalt": "kvdistill",
    }


def _bytes(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()

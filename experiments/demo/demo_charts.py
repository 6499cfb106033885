"""The demo's charts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.demo.demo_config import ArmName
from experiments.demo.results import Results
from kvdistill.report.finished_runs import Points
from student_trainer.monitoring.chart_style import LIGHT, Theme, draw, html_figure

Chart = Callable[[Axes, Results, Theme], None]

_COLOURS: dict[ArmName, int] = {"kv_two_teachers": 0, "kv_one_teacher": 2, "no_kv": 5, "shuffled_kv": 1}


def _colour(theme: Theme, arm: ArmName) -> str:
    return theme.series[_COLOURS[arm]]


def draw_accuracy(axes: Axes, results: Results, theme: Theme) -> None:
    """The mean accuracy of each arm with a dot per seed, and chance."""
    colours = [_colour(theme, name) for name in results.arms]
    values = [arm.mean_accuracy for arm in results.arms.values()]
    axes.barh(list(results.arms), values, color=colours, height=0.6)
    for row, arm in enumerate(results.arms.values()):
        if len(arm.accuracy) > 1:
            axes.plot(arm.accuracy, [row] * len(arm.accuracy), "o", color=theme.ink, markersize=4)
        axes.text(max(arm.accuracy) + 0.02, row, f"{arm.mean_accuracy:.1%}", va="center")
    axes.axvline(results.chance, color=theme.ink, linestyle="--", linewidth=1)
    axes.text(results.chance + 0.01, -0.62, f"chance {results.chance:.1%}", fontsize="small")
    axes.set_ylim(len(results.arms) - 0.5, -0.9)
    axes.set_xlim(0, 1.15)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("Accuracy on held-out test items")


def draw_learning(axes: Axes, results: Results, theme: Theme) -> None:
    """Validation accuracy over steps."""
    _curves(axes, {name: arm.accuracy_curve for name, arm in results.arms.items()}, theme)
    axes.axhline(results.chance, color=theme.ink, linestyle="--", linewidth=1)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("Accuracy on validation items")


def draw_kv_loss(axes: Axes, results: Results, theme: Theme) -> None:
    """The normalised KV loss over steps."""
    _curves(axes, {name: arm.kv_loss_curve for name, arm in results.arms.items()}, theme)
    axes.axhline(1.0, color=theme.ink, linestyle="--", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_title("KV loss in training (1.0: predicting the mean)")


def draw_costs(axes: Axes, results: Results, theme: Theme) -> None:
    """Bytes sent per sample compared with the teachers' whole caches."""
    values = {"sent": results.bytes_per_sample, "whole bf16 cache": results.raw_bf16_bytes_per_sample}
    _bars(axes, values, [_colour(theme, "kv_two_teachers"), _colour(theme, "no_kv")], ",.0f")
    axes.set_title("Bytes per sample, both teachers")


def draw_stages(axes: Axes, results: Results, theme: Theme) -> None:
    """The time of one request by stage, and how long the training thread waited for it."""
    colours = [_colour(theme, "shuffled_kv" if name == "stall" else "kv_two_teachers") for name in results.stages_ms]
    _bars(axes, results.stages_ms, colours, ".1f")
    axes.set_title(f"Time per micro-batch and teacher in ms (stall {results.stall_fraction:.1%})")


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
        axes = figure.subplot_mosaic([["0", "0"], ["1", "2"], ["3", "4"]])
        for number, chart in enumerate(CHARTS.values()):
            chart(axes[str(number)], results, theme)
        figure.suptitle("kvdistill demo: reasoning in latents, taught by K/V", fontweight="bold")

    return draw(fill, LIGHT, (12, 12), "png")


def chart_figure(title: str, results: Results) -> str:
    """One chart for an HTML page."""
    return html_figure(title, (lambda figure, theme: CHARTS[title](figure.subplots(), results, theme), (5.4, 3.4)))


def _bars(axes: Axes, values: Mapping[str, float], colours: Sequence[str], form: str) -> None:
    """Horizontal bars with their values."""
    most = max(values.values(), default=0.0) or 1.0
    axes.barh(list(values), list(values.values()), color=colours, height=0.6)
    for row, value in enumerate(values.values()):
        axes.text(value + most * 0.02, row, format(value, form), va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, most * 1.25)


def _curves(axes: Axes, curves: Mapping[ArmName, Points], theme: Theme) -> None:
    for name, points in curves.items():
        if points:
            line = "--" if name == "shuffled_kv" else "-"
            axes.plot(*zip(*points, strict=True), line, color=_colour(theme, name), label=name)
    axes.set_xlabel("step")
    if axes.get_lines():
        axes.legend(frameon=False, fontsize="small")

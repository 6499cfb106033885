"""The demo's picture of accuracy against the time of an answer."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.demo.questions import WRITTEN, Inference
from student_trainer.monitoring.chart_style import Theme, html_figure

_CAPTION = (
    "The same weights, after fewer latent passes than in training and with written reasoning. Accuracy on all test "
    "items; the time of a whole answer is the median of 20 questions, one at a time, on the CPU."
)


def inference_figure(inference: Inference) -> str:
    """One point for each way to answer, for an HTML page."""

    def fill(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for number, way in enumerate(inference.ways):
            marker = "s" if way.name == WRITTEN else "o"
            axes.plot(
                way.milliseconds, way.accuracy, marker, color=theme.series[number % len(theme.series)], label=way.name
            )
        axes.legend(frameon=False, fontsize="small", loc="center left")
        axes.set_ylim(0, 1.15)
        axes.set_xlim(0, 1.3 * max(way.milliseconds for way in inference.ways))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("milliseconds per question")
        axes.set_title("Accuracy against time")

    return html_figure("Accuracy against time", (fill, (5.4, 3.4)), _CAPTION)

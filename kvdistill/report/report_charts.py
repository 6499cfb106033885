"""The report's charts: learning curves, routing weights over time and by dataset, KV loss by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from kvdistill.report.finished_runs import Run
from student_trainer.monitoring.chart_style import Layout, Theme

WEIGHTS = "routing/weights_mean/"
BY_DATASET = "val/by_dataset/"
_DASHES = ("-", "--", ":", "-.")
_MOST_COLUMNS = 3
_PANEL_WIDTH = 4.4


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture.

    Attributes:
        name: of the file, without suffix.
        title: of the picture.
        caption: shown below.
        layout: what to draw, given the largest number of panels side by side.
    """

    name: str
    title: str
    caption: str
    layout: Callable[[int], Layout]

    @property
    def wide(self) -> Layout:
        """For files and wide windows."""
        return self.layout(_MOST_COLUMNS)

    @property
    def narrow(self) -> Layout:
        """For phones."""
        return self.layout(1)


def pictures(runs: Sequence[Run]) -> tuple[list[Picture], list[str]]:
    """Returns the pictures of the runs, and a sentence for each picture that cannot be drawn."""
    # One colour per teacher, and per run, in all pictures.
    teachers = _teachers(runs)
    results = (_learning(runs), _routing(runs, teachers), _routing_by_dataset(runs, teachers), _kv_by_layer(runs))
    drawn = [one for one in results if isinstance(one, Picture)]
    return drawn, [one for one in results if isinstance(one, str)]


# ------------------------------------------------------------------------------------------- learning curves

_CURVES = (
    ("Accuracy in validation", ("val/task_metrics/accuracy",)),
    ("Cross-entropy: training (thin), validation", ("train/ce_loss", "val/ce_loss")),
    ("KV loss: training (thin), validation", ("train/kv_loss", "val/kv_loss")),
)


def _learning(runs: Sequence[Run]) -> Picture | str:
    if not any(run.metrics for run in runs):
        return "No learning curves: no run has a metrics.jsonl."

    def fill(figure: Figure, theme: Theme, columns: int) -> None:
        for axes, (title, names) in zip(_panels(figure, len(_CURVES), columns), _CURVES, strict=True):
            for number, run in enumerate(runs):
                for name in names:
                    thin = len(names) > 1 and name.startswith("train/")
                    _line(axes, run.series(name), theme, number, width=0.8 if thin else 1.8)
            _titled(axes, title, "step")
        axes_accuracy, _, axes_kv = figure.axes
        axes_accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
        if axes_kv.get_lines():
            axes_kv.axhline(1.0, color=theme.ink, linestyle="--", linewidth=1)
            axes_kv.set_ylim(bottom=0)
        _legend(figure, theme, _numbers([run.name for run in runs]), columns)

    caption = (
        "By step of each run. In latent mode the cross-entropy of training includes the reasoning's as text, that of "
        "validation is the answer's alone. Predicting the mean gives a KV loss of 1.0 (dashed); below 0.5 is good, "
        "above 1.5 check the alignment."
    )
    layout = _in_columns(fill, len(_CURVES), 4.0, len(runs))
    return Picture("learning_curves", "Learning curves", caption, layout)


# ------------------------------------------------------------------------------------------- routing


def _routing(runs: Sequence[Run], teachers: Sequence[str]) -> Picture | str:
    routed = [run for run in runs if len(run.names(WEIGHTS)) > 1]
    if not routed:
        return "No routing weights: no run has several teachers."

    def fill(figure: Figure, theme: Theme, columns: int) -> None:
        for axes, run in zip(_panels(figure, len(routed), columns), routed, strict=True):
            # Each line is thinner than the one below it, so that equal weights show every teacher.
            for place, name in enumerate(reversed(run.names(WEIGHTS))):
                width = 1.8 * (len(teachers) - place)
                _line(axes, run.series(f"{WEIGHTS}{name}"), theme, teachers.index(name), width=width)
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            _titled(axes, run.name, "step")
        _legend(figure, theme, _numbers(teachers), columns)

    return Picture(
        "routing_weights",
        "Routing weights over time",
        "Each teacher's mean weight over the training samples since the previous logged step.",
        _in_columns(fill, len(routed), 3.0, len(teachers)),
    )


def _teachers(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.names(WEIGHTS)))


def weights_by_dataset(run: Run) -> dict[str, dict[str, float]]:
    """Each teacher's mean weight by dataset of the validation samples, at the run's best step."""
    found: dict[str, dict[str, float]] = {}
    for name, weight in run.validation.items():
        dataset, separator, teacher = name.removeprefix(BY_DATASET).partition(f"/{WEIGHTS}")
        if name.startswith(BY_DATASET) and separator:
            found.setdefault(dataset, {})[teacher] = weight
    return found


def _routing_by_dataset(runs: Sequence[Run], teachers: Sequence[str]) -> Picture | str:
    routed = [(run, weights_by_dataset(run)) for run in runs]
    routed = [(run, weights) for run, weights in routed if weights]
    if not routed:
        return (
            "No routing weights by dataset: no run with weights per sample has validation samples that name their "
            "dataset."
        )
    most = max(len(weights) for _, weights in routed)

    def fill(figure: Figure, theme: Theme, columns: int) -> None:
        for axes, (run, weights) in zip(_panels(figure, len(routed), columns), routed, strict=True):
            _stacked(axes, weights, teachers, theme)
            axes.set_title(run.name)
        _legend(figure, theme, _numbers(teachers), columns, bars=True)

    return Picture(
        "routing_by_dataset",
        "Routing weights by dataset",
        "Each teacher's mean weight over the validation samples of a dataset, at the best validation of the run "
        "(the last validation if the run has not ended).",
        _in_columns(fill, len(routed), 1.4 + 0.45 * most, len(teachers)),
    )


def _stacked(axes: Axes, weights: dict[str, dict[str, float]], teachers: Sequence[str], theme: Theme) -> None:
    names, left = list(weights), [0.0] * len(weights)
    for number, teacher in enumerate(teachers):
        widths = [weights[name].get(teacher, 0.0) for name in names]
        axes.barh(names, widths, left=left, height=0.65, color=_colour(theme, number))
        for row, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width >= 0.12:
                place = start + width / 2
                axes.text(place, row, f"{width:.0%}", ha="center", va="center", color=theme.ground, fontsize="small")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 1.001)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))


# ------------------------------------------------------------------------------------------- KV loss by layer


def kv_by_layer(run: Run, tensor: str) -> list[tuple[int, float]]:
    """The normalised KV error of keys (`k`) or values (`v`) by student layer, at the run's best step."""
    prefix = f"val/kv_loss/{tensor}/layer"
    found = [(int(name.removeprefix(prefix)), e) for name, e in run.validation.items() if name.startswith(prefix)]
    return sorted(found)


def _kv_by_layer(runs: Sequence[Run]) -> Picture | str:
    measured = {number: run for number, run in enumerate(runs) if kv_by_layer(run, "k")}
    if not measured:
        return "No KV loss by layer: no run validated K/V against one shared target."

    def fill(figure: Figure, theme: Theme, columns: int) -> None:
        for axes, (tensor, name) in zip(_panels(figure, 2, columns), (("k", "keys"), ("v", "values")), strict=True):
            for number, run in measured.items():
                _line(axes, kv_by_layer(run, tensor), theme, number, marker="o")
            axes.axhline(1.0, color=theme.ink, linestyle="--", linewidth=1)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            _titled(axes, f"KV loss of {name}", "student layer")
        _legend(figure, theme, {run.name: number for number, run in measured.items()}, columns)

    return Picture(
        "kv_loss_by_layer",
        "KV loss by layer",
        "Normalised KV error of the validation samples in each student layer, at the best validation of the run (the "
        "last validation if the run has not ended). Predicting the mean gives 1.0 (dashed).",
        _in_columns(fill, 2, 3.6, len(measured)),
    )


# ------------------------------------------------------------------------------------------- parts


def _colour(theme: Theme, number: int) -> str:
    return theme.series[number % len(theme.series)]


def _line_style(theme: Theme, number: int) -> str:
    """Dashes differ where colours repeat."""
    return _DASHES[number // len(theme.series) % len(_DASHES)]


def _line(
    axes: Axes,
    points: Sequence[tuple[int, float]],
    theme: Theme,
    number: int,
    *,
    width: float = 1.8,
    marker: str | None = None,
) -> None:
    if not points:
        return
    # A line needs two points to be visible.
    marker = "o" if len(points) == 1 else marker
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        _line_style(theme, number),
        color=_colour(theme, number),
        linewidth=width,
        marker=marker,
        markersize=4,
    )


def _titled(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)


def _in_columns(
    fill: Callable[[Figure, Theme, int], None], count: int, height: float, names: int
) -> Callable[[int], Layout]:
    """The layout of `count` panels of this height in inches, above a legend of `names`."""

    def layout(most: int) -> Layout:
        columns = min(count, most)
        # A panel alone in its row is as wide as the page.
        width = max(_PANEL_WIDTH * columns, _PANEL_WIDTH if most == 1 else 6.0)
        legend = 0.25 * math.ceil(names / _legend_columns(columns)) + 0.25
        return lambda figure, theme: fill(figure, theme, columns), (width, height * math.ceil(count / columns) + legend)

    return layout


def _panels(figure: Figure, count: int, columns: int) -> list[Axes]:
    """Axes in rows; hides unused ones."""
    grid = figure.subplots(math.ceil(count / columns), columns, squeeze=False)
    panels: list[Axes] = list(grid.flat)
    for unused in panels[count:]:
        unused.set_visible(False)
    return panels[:count]


def _legend_columns(columns: int) -> int:
    return 1 if columns == 1 else 3


def _numbers(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _legend(figure: Figure, theme: Theme, names: Mapping[str, int], columns: int, *, bars: bool = False) -> None:
    """Adds a legend of names, each with the number of its colour."""
    axes = figure.axes[0]
    handles = [
        axes.plot([], [], "s" if bars else _line_style(theme, number), color=_colour(theme, number), label=name)[0]
        for name, number in names.items()
    ]
    most = min(_legend_columns(columns), len(names))
    figure.legend(handles=handles, loc="outside lower center", ncols=most, frameon=False)

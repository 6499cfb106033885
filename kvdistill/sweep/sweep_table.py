"""The table of a sweep: means over seeds with their 95 % confidence intervals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scipy.special import stdtrit

from kvcore.files import replace_file
from kvdistill.report.finished_runs import AVERAGE, Run, find_runs
from kvdistill.report.report_table import UNKNOWN, markdown, to_csv
from kvdistill.sweep.sweep_runs import SweepRun

_LEVEL = 0.95
KV_LOSS = "KV loss"


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over `count` seeds.

    `half`: half the width of Student's t 95 % confidence interval, None for one seed.
    """

    value: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean and interval of one value per seed."""
        count = len(values)
        mean = math.fsum(values) / count
        if count == 1:
            return cls(mean, None, 1)
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        return cls(mean, float(stdtrit(count - 1, (1 + _LEVEL) / 2)) * math.sqrt(variance / count), count)

    def shown(self, form: str) -> str:
        """The mean and its interval as text. `form`: such as `.1f`, or `+.1f` for a mean with its sign."""
        half = "" if self.half is None else f" ± {self.half:{form.removeprefix('+')}}"
        return f"{self.value:{form}}{half}"


@dataclass(frozen=True, slots=True)
class Row:
    """The results of one combination of options in one stage.

    `stage`: empty if there are no stages. `figures`: by metric, one value per seed that has it.
    """

    options: tuple[str, ...]
    stage: str
    seeds: list[int] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)


def write_table(runs: Sequence[SweepRun]) -> tuple[str, list[Path]]:
    """Writes table.md and table.csv of the finished runs; returns the Markdown and the paths."""
    sweep = runs[0].sweep
    rows = _rows(runs)
    columns = list(dict.fromkeys(name for row in rows for name in row.figures))
    # Datasets first, then the average and the KV loss.
    columns.sort(key=lambda name: (name == AVERAGE) + 2 * (name == KV_LOSS))
    keys = [*sweep.axes, "stage"] if any(row.stage for row in rows) else list(sweep.axes)
    text = markdown([*keys, *columns, "seeds"], [_cells(row, columns, len(keys)) for row in rows])
    sweep.output_dir.mkdir(parents=True, exist_ok=True)
    paths = [sweep.output_dir / name for name in ("table.md", "table.csv")]
    for path, content in zip(paths, (text, _csv(rows, columns, keys)), strict=True):
        replace_file(path, content)
    return text, paths


def _rows(runs: Sequence[SweepRun]) -> list[Row]:
    """One row per combination of options and stage; a row without figures if none of its runs is done."""
    rows: list[Row] = []
    for options, group in itertools.groupby(runs, key=lambda run: tuple(run.options.values())):
        found: dict[str, Row] = {}
        for run in group:
            for stage, trained in _stages(run):
                row = found.setdefault(stage, Row(options, stage))
                row.seeds.append(run.seed)
                for name, value in _figures(trained).items():
                    row.figures.setdefault(name, []).append(value)
        rows += found.values() or [Row(options, "")]
    return rows


def _stages(run: SweepRun) -> list[tuple[str, Run]]:
    """The trainings below a finished run's folder, with their stages. A run without stages has the stage ''."""
    if not run.is_done:
        return []
    home = run.directory.resolve()
    return [(found.path.relative_to(home).as_posix().removeprefix("."), found) for found in find_runs([home])]


def _figures(run: Run) -> dict[str, float]:
    figures = {dataset: score.value for dataset, score in run.scores.items()}
    if run.average is not None:
        figures[AVERAGE] = run.average
    if "val/kv_loss" in run.validation:
        figures[KV_LOSS] = run.validation["val/kv_loss"]
    return figures


def _cells(row: Row, columns: Sequence[str], keys: int) -> list[str]:
    return [*_key(row, keys), *(_cell(row, name) for name in columns), str(len(row.seeds))]


def _key(row: Row, keys: int) -> list[str]:
    return [*row.options, row.stage or UNKNOWN][:keys]


def _cell(row: Row, name: str) -> str:
    if name not in row.figures:
        return UNKNOWN
    mean, form = Mean.of(row.figures[name]), ".3f" if name == KV_LOSS else ".1f"
    half = "" if mean.half is None else f" ± {mean.half:{form}}"
    # Some seeds may lack this figure.
    short = f" ({mean.count} of {len(row.seeds)} seeds)" if mean.count < len(row.seeds) else ""
    return f"{mean.value:{form}}{half}{short}"


def _csv(rows: Sequence[Row], columns: Sequence[str], keys: Sequence[str]) -> str:
    """One line per row: each mean with its interval, its number of seeds, and the values of the seeds."""
    parts = ("", "_low", "_high", "_count", "_by_seed")
    lines: list[Sequence[object]] = [[*keys, *(f"{name}{part}" for name in columns for part in parts), "seeds"]]
    for row in rows:
        line: list[object] = [*_key(row, len(keys))]
        for name in columns:
            values = row.figures.get(name, [])
            if not values:
                line += [None, None, None, 0, None]
                continue
            mean = Mean.of(values)
            ends = (None, None) if mean.half is None else (mean.value - mean.half, mean.value + mean.half)
            line += [mean.value, *ends, mean.count, " ".join(map(str, values))]
        lines.append([*line, " ".join(map(str, row.seeds))])
    return to_csv(lines)

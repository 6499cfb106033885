"""The table that compares runs, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from kvdistill.report.finished_runs import Run, Score

Rows = list[list[str]]
UNKNOWN = "-"


def datasets(runs: Sequence[Run]) -> list[str]:
    """The datasets for which any run has a score, in order of appearance."""
    return list(dict.fromkeys(dataset for run in runs for dataset in run.scores))


def comparison(runs: Sequence[Run]) -> tuple[list[str], Rows]:
    """Returns headings and one row per run: scores in percent, losses of the validation, then the costs of training."""
    columns = datasets(runs)
    headings = ["run", *columns, "average", "cross-entropy", "perplexity", "KV loss"]
    headings += ["steps", "samples/s", "waiting", "bytes/sample"]
    return headings, [_row(run, columns) for run in runs]


def _row(run: Run, columns: Sequence[str]) -> list[str]:
    summary = run.summary or {}
    steps = UNKNOWN if run.steps is None else str(run.steps)
    # A folder with scores but without metrics was not necessarily trained here, so it is not unfinished.
    unfinished = run.summary is None and run.steps is not None
    return [
        run.name,
        *(score_cell(run.scores.get(column)) for column in columns),
        _number(run.average, ".1f"),
        _number(run.validation.get("val/ce_loss"), ".3f"),
        _number(run.validation.get("val/perplexity"), ",.2f"),
        _number(run.validation.get("val/kv_loss"), ".3f"),
        f"{steps}, unfinished" if unfinished else steps,
        _number(summary.get("samples_per_second"), ",.1f"),
        _number(summary.get("stall_fraction"), ".1%"),
        _number(summary.get("bytes_per_sample"), ",.0f"),
    ]


def score_cell(score: Score | None) -> str:
    """A score with its interval, if it has one."""
    if score is None:
        return UNKNOWN
    interval = "" if score.low is None or score.high is None else f" [{score.low:.1f}, {score.high:.1f}]"
    return f"{score.value:.1f}{interval}"


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def comparison_csv(runs: Sequence[Run]) -> str:
    """One line per run with every value unrounded in its own column; unknown values are empty."""
    columns = datasets(runs)
    parts = ("", "_low", "_high", "_num_examples")
    headings = ["run", *(f"{column}{part}" for column in columns for part in parts), "average"]
    headings += [*(f"val_{name}" for name in _LOSSES), "steps", "finished", *_COSTS]
    return to_csv([headings, *([*_plain(run, columns)] for run in runs)])


_LOSSES = ("ce_loss", "answer_ce", "perplexity", "kv_loss", "loss")
_COSTS = ("samples_per_second", "stall_fraction", "bytes_per_sample", "seconds")


def _plain(run: Run, columns: Sequence[str]) -> list[object]:
    cells: list[object] = [run.name]
    for column in columns:
        score = run.scores.get(column)
        cells += [""] * 4 if score is None else [score.value, score.low, score.high, score.num_examples]
    summary = run.summary or {}
    losses = (run.validation.get(f"val/{name}") for name in _LOSSES)
    cells += [run.average, *losses, run.steps, run.summary is not None]
    return [*cells, *(summary.get(name) for name in _COSTS)]


def to_csv(rows: Sequence[Sequence[object]]) -> str:
    """Comma-separated values; None is an empty cell."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()

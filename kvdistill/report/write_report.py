"""`kvdistill report`: tables and pictures of training runs, as files and as one page that stands on its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kvcore.files import replace_file
from kvcore.monitoring.html_page import figure, heading, page, paragraphs, table
from kvdistill.report.chart_style import DARK, LIGHT, draw
from kvdistill.report.finished_runs import Run, find_runs
from kvdistill.report.report_charts import Picture, pictures
from kvdistill.report.report_table import comparison, comparison_csv, markdown

_SCORES = (
    "Scores are in percent, with their 95 % bootstrap interval where the evaluation measured it. KV loss is the "
    "normalised error in validation, at the best step."
)


def write_report(outputs: Sequence[Path], output: Path) -> list[Path]:
    """Writes report.html, report.md, report.csv and a PNG per picture into `output`; prints the table and the paths.

    Args:
        outputs: folders of runs, or folders above some, such as the `run.output_dir` of a run with stages.
        output: where the files go; made if missing.

    Raises:
        ConfigError: one of `outputs` holds no run, or a file in it cannot be read.
    """
    runs = find_runs(outputs)
    headings, rows = comparison(runs)
    drawn, missing = pictures(runs)
    output.mkdir(parents=True, exist_ok=True)
    files = {
        "report.html": _page(runs, drawn, missing),
        "report.md": markdown(headings, rows),
        "report.csv": comparison_csv(runs),
        **{f"{one.name}.png": draw(one.fill, LIGHT, one.inches, "png") for one in drawn},
    }
    for name, content in files.items():
        replace_file(output / name, content)
    paths = [output / name for name in files]
    sys.stdout.write("".join((markdown(headings, rows), *(f"{line}\n" for line in (*missing, *paths)))))
    return paths


def _page(runs: Sequence[Run], drawn: Sequence[Picture], missing: Sequence[str]) -> str:
    return page(
        "kvdistill report",
        (
            heading("Training runs compared", 1),
            paragraphs([_SCORES]),
            table(*comparison(runs)),
            *(f"{heading(one.title)}\n{_figure(one)}" for one in drawn),
            paragraphs(missing),
            heading("Where the runs are"),
            table(("run", "folder"), [(run.name, run.path) for run in runs]),
        ),
    )


def _figure(picture: Picture) -> str:
    light, dark = (draw(picture.fill, theme, picture.inches, "svg") for theme in (LIGHT, DARK))
    return figure(picture.title, light, dark, picture.caption)

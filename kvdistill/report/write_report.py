"""`kvdistill report`: compares training runs in a table, pictures, and one self-contained HTML page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kvcore.files import replace_file
from kvcore.monitoring.html_page import heading, page, paragraphs, table
from kvdistill.report.finished_runs import Run, find_runs
from kvdistill.report.report_charts import Picture, pictures
from kvdistill.report.report_table import comparison, comparison_csv, markdown
from student_trainer.monitoring.chart_style import LIGHT, draw, html_figure

_SCORES = (
    "Scores are in percent, with the 95 % bootstrap interval if the evaluation measured one. KV loss is the normalised "
    "validation error at the best step."
)


def write_report(outputs: Sequence[Path], output: Path) -> list[Path]:
    """Writes report.html, report.md, report.csv and a PNG per picture into `output`; prints the table and the paths.

    Args:
        outputs: folders of runs, or parents of such folders, like the `run.output_dir` of a run with stages.
        output: the folder for the files; created if missing.

    Raises:
        ConfigError: one of `outputs` has no run, or a file in it cannot be read.
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
            *(f"{heading(one.title)}\n{html_figure(one.title, one.fill, one.inches, one.caption)}" for one in drawn),
            paragraphs(missing),
            heading("Folders"),
            table(("run", "folder"), [(run.name, run.path) for run in runs]),
        ),
    )

"""`kvdistill report`: compares training runs in a table, pictures, and one self-contained HTML page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kvcore.early_checks import check_output
from kvcore.files import replace_file
from kvcore.monitoring.html_page import heading, page, paragraphs, stack
from kvdistill.report.finished_runs import Run, find_runs
from kvdistill.report.latent_report import latent_sections
from kvdistill.report.report_charts import Picture, pictures
from kvdistill.report.report_table import comparison, comparison_csv, markdown
from student_trainer.monitoring.chart_style import LIGHT, draw, html_figure

_SCORES = (
    "Scores are in percent, with their 95 % intervals: Wilson's for shares of right answers, and the bootstrap's for "
    "other means. Intervals that overlap say that the runs may be equally good."
)
_LOSSES = (
    "Cross-entropy (nats per token), its perplexity, and the KV loss (the normalised error) are those of the "
    "validation at the best step."
)


def write_report(outputs: Sequence[Path], output: Path, prompts: Path | None = None) -> list[Path]:
    """Writes report.html, report.md, report.csv and a PNG per picture into `output`; prints the table and the paths.

    Args:
        outputs: folders of runs, or parents of such folders, like the `run.output_dir` of a run with stages.
        output: the folder for the files; created if missing.
        prompts: records; the page shows what the latents of the runs' students say about the first few.

    Raises:
        ConfigError: one of `outputs` has no run, or a file in it cannot be read, or `prompts` cannot be read or used.
    """
    check_output(output, "--output")
    runs = find_runs(outputs)
    headings, rows = comparison(runs)
    drawn, missing = pictures(runs)
    latents = latent_sections(runs, prompts)
    output.mkdir(parents=True, exist_ok=True)
    files = {
        "report.html": _page(runs, drawn, missing, latents),
        "report.md": markdown(headings, rows),
        "report.csv": comparison_csv(runs),
        **{f"{one.name}.png": draw(one.wide[0], LIGHT, one.wide[1], "png") for one in drawn},
    }
    for name, content in files.items():
        replace_file(output / name, content)
    paths = [output / name for name in files]
    sys.stdout.write("".join((markdown(headings, rows), *(f"{line}\n" for line in (*missing, *paths)))))
    return paths


def _tables(runs: Sequence[Run]) -> tuple[str, ...]:
    """Scores, then losses and costs, so that neither table is wider than a window."""
    headings, rows = comparison(runs)
    losses = headings.index("cross-entropy")
    return (
        stack(headings[:losses], [row[:losses] for row in rows]),
        heading("Losses and costs"),
        paragraphs([_LOSSES]),
        stack([headings[0], *headings[losses:]], [[row[0], *row[losses:]] for row in rows]),
    )


def _figure(picture: Picture) -> str:
    return html_figure(picture.title, picture.wide, picture.caption, narrow=picture.narrow)


def _page(runs: Sequence[Run], drawn: Sequence[Picture], missing: Sequence[str], latents: Sequence[str]) -> str:
    return page(
        "kvdistill report",
        (
            heading("Training runs compared", 1),
            paragraphs([_SCORES]),
            *_tables(runs),
            *(f"{heading(one.title)}\n{_figure(one)}" for one in drawn),
            paragraphs(missing),
            *latents,
            heading("Folders"),
            stack(("run", "folder"), [(run.name, run.path) for run in runs]),
        ),
    )

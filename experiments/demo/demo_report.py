"""The demo's report: report.json, report.png, report.html, and a table on stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.demo.demo_charts import draw_picture
from experiments.demo.demo_config import ArmName
from experiments.demo.demo_page import render_page
from experiments.demo.results import Results
from kvcore.files import replace_file, write_json

HEADINGS = ("arm", "accuracy", "KV loss", "what the student learns from")
LEARNS_FROM: dict[ArmName, str] = {
    "kv_two_teachers": "answer, reasoning text, K/V of both teachers fused",
    "kv_one_teacher": "answer, reasoning text, K/V of teacher_a",
    "no_kv": "answer, reasoning text",
    "shuffled_kv": "answer, reasoning text, other samples' K/V of both teachers",
}


def write_report(results: Results, output: Path) -> list[Path]:
    """Writes report.json, report.png and report.html, prints the table and the verdict, and returns the paths."""
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / name for name in ("report.json", "report.png", "report.html")]
    rows, sentences = table_rows(results), verdict(results)
    write_json(paths[0], results.as_json())
    replace_file(paths[1], draw_picture(results))
    replace_file(paths[2], render_page(results, HEADINGS, rows, sentences))
    sys.stdout.write("\n".join([*text_table([HEADINGS, *rows]), *sentences, ""]))
    sys.stdout.flush()
    return paths


def table_rows(results: Results) -> list[tuple[str, ...]]:
    """The table's rows: one per arm, then chance."""
    rows = [
        (
            name,
            " / ".join(f"{value:.1%}" for value in arm.accuracy),
            " / ".join("-" if value is None else f"{value:.3f}" for value in arm.kv_loss),
            LEARNS_FROM[name],
        )
        for name, arm in results.arms.items()
    ]
    return [*rows, ("chance", f"{results.chance:.1%}", "", "guessing among all answers")]


def verdict(results: Results) -> list[str]:
    """The results in sentences, or what is not as expected."""
    misses = results.misses()
    if misses:
        return ["NOT as expected:", *misses, "So this run does not show what the demo is meant to show."]
    without, taught, shuffled = (
        results.arms[name].mean_accuracy for name in ("no_kv", "kv_two_teachers", "shuffled_kv")
    )
    gain = (
        f"With the same student, data, steps and seeds, the teachers' K/V raise the accuracy without reasoning text "
        f"from {without:.1%} to {taught:.1%}. K/V of other samples do not: {shuffled:.1%}, where chance is "
        f"{results.chance:.1%}."
    )
    replay = (
        f"The epoch replayed from the store repeats the recorded one: over {results.replay.steps} steps the losses "
        f"differ by at most {results.replay.largest_difference:.1e}."
    )
    costs = (
        f"Each sample took {results.bytes_per_sample:.0f} bytes on the wire; the teachers' whole caches in bf16 have "
        f"{results.raw_bf16_bytes_per_sample:.0f}. Waiting for K/V took {results.stall_fraction:.1%} of the time."
    )
    return [gain, replay, costs]


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned by spaces."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

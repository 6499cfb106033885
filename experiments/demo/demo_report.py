"""The demo's report: report.json, a table on the terminal, one picture, and one page that stands on its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.demo.demo_charts import draw_picture
from experiments.demo.demo_config import CONTROLS, ArmName
from experiments.demo.demo_page import render_page
from experiments.demo.results import Arm, Replay, Results
from kvcore.files import replace_file, write_json

HEADINGS = ("arm", "accuracy", "KV loss", "what the student learns from")
WHAT_IS: dict[ArmName, str] = {
    "kv_two_teachers": "answer, reasoning text, K/V of both teachers fused",
    "kv_one_teacher": "answer, reasoning text, K/V of teacher_a",
    "no_kv": "answer, reasoning text",
    "shuffled_kv": "answer, reasoning text, other samples' K/V of both teachers",
}


def write_report(results: Results, output: Path) -> list[Path]:
    """Writes report.json, report.png and report.html, prints the table and the verdict, and returns the paths."""
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / name for name in ("report.json", "report.png", "report.html")]
    rows, said = table_rows(results), verdict(results)
    write_json(paths[0], results.as_json())
    replace_file(paths[1], draw_picture(results))
    replace_file(paths[2], render_page(results, HEADINGS, rows, said))
    show(rows, said, Console())
    return paths


def table_rows(results: Results) -> list[tuple[str, ...]]:
    """The table's rows: one per arm, then chance."""
    rows = [(name, _accuracy(arm), _kv_loss(arm), WHAT_IS[name]) for name, arm in results.arms.items()]
    return [*rows, ("chance", f"{results.chance:.1%}", "", "guessing among all answers")]


def verdict(results: Results) -> list[str]:
    """What came out, in sentences; misses first and by name."""
    misses = results.misses()
    if misses:
        return ["NOT as expected:", *misses, "So this run does not show what the demo is meant to show."]
    return [_gain(results), _replay(results.replay), _costs(results)]


def _gain(results: Results) -> str:
    without, taught, shuffled = (_mean(results.arms[name]) for name in ("no_kv", "kv_two_teachers", "shuffled_kv"))
    return (
        f"With the same student, data, steps and seeds, the paired K/V of the teachers lift the accuracy without any "
        f"reasoning text from {without:.1%} to {taught:.1%}; K/V of other samples do not ({shuffled:.1%}; chance is "
        f"{results.chance:.1%})."
    )


def _replay(replay: Replay) -> str:
    return (
        f"The epoch replayed from the store repeats the recorded one: {replay.steps} steps, losses differ by at most "
        f"{replay.largest_difference:.1e}."
    )


def _costs(results: Results) -> str:
    return (
        f"Per sample {results.bytes_per_sample:.0f} bytes travelled, where the teachers' whole bf16 caches have "
        f"{results.raw_bf16_bytes_per_sample:.0f}; waiting for K/V took {results.stall_fraction:.1%} of the time."
    )


def show(rows: Sequence[tuple[str, ...]], said: Sequence[str], console: Console) -> None:
    """Prints table and verdict: with lines and colour on a terminal, else plain columns."""
    if console.is_terminal:
        _show_rich(rows, console)
    else:
        for line in plain_table([HEADINGS, *rows]):
            console.file.write(line + "\n")
    for sentence in said:
        if console.is_terminal:
            console.print(sentence, markup=False, highlight=False)
        else:
            console.file.write(sentence + "\n")
    console.file.flush()


def plain_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned by spaces."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _show_rich(rows: Sequence[tuple[str, ...]], console: Console) -> None:
    table = Table(*HEADINGS, title="Accuracy on held-out items, no reasoning text at inference")
    for row in rows:
        style = "dim" if row[0] in CONTROLS or row[0] == "chance" else "bold"
        table.add_row(*row, style=style)
    console.print(table)


def _accuracy(arm: Arm) -> str:
    return " / ".join(f"{value:.1%}" for value in arm.accuracy)


def _kv_loss(arm: Arm) -> str:
    return " / ".join("-" if value is None else f"{value:.3f}" for value in arm.kv_loss)


def _mean(arm: Arm) -> float:
    return sum(arm.accuracy) / len(arm.accuracy)

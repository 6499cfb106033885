"""The tables of the run on a real model: real.md and real.json, and on stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from experiments.demo.demo_report import text_table
from experiments.real.real_results import LOSSES, PARTS, RealResults, RealRunResult
from kvcore.files import replace_file, write_json
from kvdistill.report.report_table import markdown

Table = list[tuple[str, ...]]
UNKNOWN = "-"
LEARNS_FROM = {
    "ce": "text",
    "kv": "text, K/V of the teacher",
    "shuffled": "text, K/V of other samples",
    "latent_ce": "text and answer after latents",
    "latent_kv": "the same, K/V of the teacher",
}


def write_report(results: RealResults, output: Path) -> None:
    """Writes real.json and real.md, and prints the tables and sentences."""
    tables = {
        "Losses on held-out records": losses(results),
        "Explained variance by student layer": explained(results),
        "Time of a step in ms (medians), and memory": costs(results),
    }
    sentences = verdict(results)
    write_json(output / "real.json", results.as_json())
    sections = [f"## {title}\n\n{markdown(table[0], table[1:])}" for title, table in tables.items()]
    replace_file(output / "real.md", "\n".join([*sections, *(f"{sentence}\n" for sentence in sentences)]))
    shown = [line for title, table in tables.items() for line in ("", title, *text_table(table))]
    sys.stdout.write("\n".join([*shown, "", *sentences, str(output / "real.md"), ""]))
    sys.stdout.flush()


def losses(results: RealResults) -> Table:
    """Cross-entropy, perplexity and KV error by arm, one value per seed."""
    table: Table = [("arm", "cross-entropy", "answer's", "perplexity", "KV loss", "learns from")]
    runs = {**results.arms, **{name: [run] for name, run in results.latent.items()}}
    for name, by_seed in runs.items():
        columns = (
            _by_seed(by_seed, lambda run, loss=loss: run.held_out.get(loss), ".1f" if loss == "perplexity" else ".3f")
            for loss in LOSSES
        )
        table.append((name, *columns, LEARNS_FROM[name]))
    return table


def explained(results: RealResults) -> Table:
    """The first seed's explained variance: fitted to the untrained student, and after training."""
    layers = len(next(iter(results.arms["kv"][0].explained.values())))
    table: Table = [("arm", "when", "tensor", *(str(layer) for layer in range(layers)))]
    for run in (results.arms["kv"][0], results.arms["shuffled"][0], results.latent["latent_kv"]):
        for when, found in (("before", run.explained), ("after", run.explained_after)):
            for tensor, values in found.items():
                table.append((run.name, when, tensor, *(_number(value, ".2f") for value in values)))
    return table


def costs(results: RealResults) -> Table:
    """The parts of a step, memory, waiting and bytes: the first seed of each arm."""
    table: Table = [("arm", *PARTS, "peak memory", "stall", "bytes per sample")]
    for run in (*(by_seed[0] for by_seed in results.arms.values()), *results.latent.values()):
        table.append(
            (
                run.name,
                *(_number(run.milliseconds.get(part), ",.0f") for part in PARTS),
                f"{run.peak_memory_mb:,.0f} MiB",
                _number(run.stall_fraction, ".1%"),
                _number(run.bytes_per_sample, ",.0f"),
            )
        )
    return table


def verdict(results: RealResults) -> list[str]:
    """The results in sentences, as they are."""
    ce, kv, shuffled = (results.perplexities(arm) for arm in ("ce", "kv", "shuffled"))
    lower = sum(taught < plain for taught, plain in zip(kv, ce, strict=True))
    highest = sum(wrong > max(others) for wrong, *others in zip(shuffled, ce, kv, strict=True))
    seeds = len(results.seeds)
    codecs = ", ".join(f"{one['codec']} {max(max(row) for row in one['relative_KL']):.1e}" for one in results.served)
    scores = ", ".join(
        f"{name} {entry['score']:.0f} % of {entry['num_examples']}"
        for name, entry in results.evaluation.items()
        if isinstance(entry, dict)
    )
    same = "repeats" if results.replay.matches else "DOES NOT repeat"
    order = (
        f"With K/V, the perplexity is lower than with cross-entropy alone in {lower} of {seeds} seeds; with K/V of "
        f"other samples, it is the highest in {highest} of {seeds}"
    )
    means = f"{_mean(ce):.1f} without a teacher, {_mean(kv):.1f} with its K/V"
    replay = f"over {results.replay.steps} steps the losses differ by at most {results.replay.largest_difference:.1e}"
    return [
        f"{order}. Mean perplexity: {means}, {_mean(shuffled):.1f} with K/V of other samples.",
        f"Served K/V against transformers, largest relative difference of a layer: {codecs}.",
        f"The replay from the store {same} the recording: {replay}.",
        f"Evaluation of the first seed's `kv` student: {scores}.",
        f"The server's peak memory was {results.server_mb:,.0f} MiB. Everything took {results.seconds['total']:.0f} s.",
    ]


def _by_seed(runs: Sequence[RealRunResult], value: Callable[[RealRunResult], float | None], form: str) -> str:
    return " / ".join(_number(value(run), form) for run in runs)


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)

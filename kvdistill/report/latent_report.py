"""The report's section about latents: the KV loss and the most likely tokens of each latent, pass by pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.records import Record, load_records
from kvcore.errors import FieldError
from kvcore.monitoring.html_page import heading, paragraphs, table
from kvdistill.report.finished_runs import Run

KV_LOSS = "val/kv_loss/latent"
_PROMPTS = 3
_UNKNOWN = "-"
_READING = (
    "The tables show the token that the model would most likely write in the place of each latent, with its "
    "probability, after each pass. The KV loss trains keys and values, not these tokens, so the tokens of a useful "
    "latent may make no sense. The KV losses are means over the validation samples at the best step."
)


def kv_by_latent(run: Run) -> dict[int, float]:
    """The normalised KV error of each latent, counted from 1, at the run's best step."""
    found = {name.removeprefix(KV_LOSS): value for name, value in run.validation.items() if name.startswith(KV_LOSS)}
    return {int(number): value for number, value in found.items()}


def latent_sections(runs: Sequence[Run], prompts: Path | None) -> list[str]:
    """HTML of the section: a table of KV losses, and the most likely tokens at the latents of each latent student.

    Args:
        runs: to compare.
        prompts: records; the students of the runs think about the first few. None: no student is loaded.

    Raises:
        ConfigError: the records or a student cannot be read, or none of the runs has a student with latents.
    """
    measured = {run.name: kv_by_latent(run) for run in runs}
    measured = {name: losses for name, losses in measured.items() if losses}
    parts: list[str] = []
    if measured:
        latents = sorted({number for losses in measured.values() for number in losses})
        rows = [(number, *(_loss(losses.get(number)) for losses in measured.values())) for number in latents]
        parts += [heading("KV loss by latent"), table(("latent", *measured), rows)]
    if prompts is not None:
        parts += [heading("What the latents say"), paragraphs([_READING])]
        parts += _thoughts(runs, load_records(prompts, _PROMPTS))
    return parts


def _thoughts(runs: Sequence[Run], records: Sequence[Record]) -> list[str]:
    # Imports torch, which reports without prompts do not need.
    from student_trainer.model.latent import LATENT_WEIGHTS  # noqa: PLC0415

    latent = [run for run in runs if (run.path / "best_model" / LATENT_WEIGHTS).is_file()]
    if not latent:
        raise FieldError("--prompts", "none of the runs has a best_model with latents; leave the option out")
    return [part for run in latent for part in (heading(run.name, 3), *_thoughts_of(run, records))]


def _thoughts_of(run: Run, records: Sequence[Record]) -> list[str]:
    from kvdistill.student import load_student  # noqa: PLC0415 - imports torch

    student, losses = load_student(run.path / "best_model"), kv_by_latent(run)
    parts: list[str] = []
    for record in records:
        (thoughts,) = student.think(_prompt(record), top=1)
        rows = [
            [place, _loss(losses.get(place)), *(_token(of_pass[place - 1][0]) for of_pass in thoughts.tokens)]
            for place in range(1, student.latents + 1)
        ]
        passes = [f"pass {number}" for number in range(1, student.passes + 1)]
        written = f"Prompt: {record.prompt} Reasoning: {record.reasoning.strip()} Answer: {record.answer.strip()}"
        parts += [paragraphs([written]), table(("latent", "KV loss", *passes), rows)]
    return parts


def _prompt(record: Record) -> Any:
    return [{"role": role, "content": content} for role, content in record.turns] or record.prompt


def _loss(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.3f}"


def _token(token: Any) -> str:
    return f"{json.dumps(token.text, ensure_ascii=False)} {token.probability:.0%}"

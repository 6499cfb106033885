"""`kvdistill generate` and `kvdistill think`: prints a student's answers, and the tokens of its latents."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import typer

from kvdistill.columns import in_columns
from kvdistill.generation_settings import LoadingSettings
from kvdistill.student import Student, load_student
from student_trainer.model.generation import Answer


def generate(model: str, loading: LoadingSettings, questions: Sequence[str], settings: dict[str, Any]) -> None:
    """Prints each answer as it is generated, and to stderr what it cost."""
    student = load_student(model, **loading.model_dump())
    for number, question in enumerate(questions):
        if len(questions) > 1:
            typer.echo("\n" * bool(number) + question)
        began = time.monotonic()
        stream = student.stream(question, **settings)
        for piece in stream:
            typer.echo(piece, nl=False)
        typer.echo()
        assert stream.answer is not None, "the stream is exhausted"
        typer.echo(_cost(student, stream.answer, settings, time.monotonic() - began), err=True)


def think(model: str, loading: LoadingSettings, question: str, settings: dict[str, Any]) -> None:
    """Prints each latent's most likely tokens, pass by pass."""
    (thoughts,) = load_student(model, **loading.model_dump()).think(question, **settings)
    typer.echo("The tokens that the model would most likely write in the place of each latent:")
    for number, latents in enumerate(thoughts.tokens):
        typer.echo(f"\nPass {number + 1} of {len(thoughts.tokens)}: {_quoted(thoughts.text(number))}")
        rows = [
            [f"latent {place}", *(f"{_quoted(token.text)} {token.probability:.1%}" for token in tokens)]
            for place, tokens in enumerate(latents, start=1)
        ]
        typer.echo(in_columns(rows))


def _cost(student: Student, answer: Answer, settings: dict[str, Any], seconds: float) -> str:
    latents, passes = settings.get("latents") or student.latents, settings.get("passes") or student.passes
    thinking = f"1 over the prompt, {passes} over {latents} latents, " if student.latents else ""
    tokens = answer.forward_passes - (1 + passes if student.latents else 0)
    cost = f"[{answer.forward_passes} forward passes: {thinking}{tokens} for the answer; {seconds:.2f} s]"
    return cost if answer.finished else f"{cost} the answer was cut off; to allow a longer one, raise --max-new-tokens"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

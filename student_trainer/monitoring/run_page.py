"""The page of a run: progress, curves, where the time goes, and the health of its teachers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse

from kvcore.files import finite_or_null, replace_file
from kvcore.monitoring.charts import chart_block
from kvcore.monitoring.html_page import heading, paragraphs, stack
from kvcore.monitoring.live_page import (
    HEADERS,
    add_scripts,
    facts,
    live_page,
    saved_page,
    shares,
    state,
    tiles,
)
from kvcore.monitoring.units import in_bytes, in_time, number
from student_trainer.config import TrainConfig
from student_trainer.kv_sources.kv_batch import TEACHER_STAGES
from student_trainer.monitoring.run_charts import run_charts
from student_trainer.monitoring.run_state import Phase, Prediction, RunSnapshot, RunState, TeacherView

SAVED = "run.html"
_LONGEST = 300  # Characters of a text in the table of answers.
_LINKS = ("/state.json", "/metrics", "/healthz")
_PHASES: Mapping[Phase, str] = {
    "starting": "Loading the student, connecting to teachers, fitting alignments",
    "training": "Training",
    "validating": "Validating",
    "saving": "Saving a checkpoint",
    "done": "Finished",
    "failed": "Failed",
}
_TEACHERS = (
    "teacher",
    "replicas",
    "in use",
    "last answer",
    "retries",
    "switches",
    "samples",
    "missing",
    "K/V per sample",
)
_STAGES = ("teacher", *(f"{stage} ms" for stage in TEACHER_STAGES), "decode ms", "stall ms")


def add_live_page(app: FastAPI, config: TrainConfig, run: RunState) -> None:
    """Adds `/`, its scripts, and `/state.json` over a run's state."""
    add_scripts(app)

    @app.get("/", response_class=HTMLResponse)
    def page() -> HTMLResponse:
        """The page."""
        return HTMLResponse(render_page(config, run.snapshot()), headers=HEADERS)

    @app.get("/state.json")
    def read_state() -> JSONResponse:
        """The run's state as JSON. Numbers that are not finite are null."""
        return JSONResponse(finite_or_null(dataclasses.asdict(run.snapshot())))


def render_page(config: TrainConfig, run: RunSnapshot) -> str:
    """The live page; every value is escaped."""
    return live_page(_title(config, run), _parts(config, run), _LINKS)


def save_page(config: TrainConfig, run: RunSnapshot) -> None:
    """Writes the page of a run that has ended to `run.html` in its directory."""
    replace_file(config.run.output_dir / SAVED, saved_page(_title(config, run), _parts(config, run)))


def _title(config: TrainConfig, run: RunSnapshot) -> str:
    progress = "Failed:" if run.phase == "failed" else _percent(run)
    return f"{progress} {config.run.output_dir.name} - kvdistill"


def _parts(config: TrainConfig, run: RunSnapshot) -> tuple[str, ...]:
    ended = f"The run has ended. {config.run.output_dir / SAVED} is this page as a file."
    return (
        heading(config.run.output_dir.name, 1),
        paragraphs([_description(config)], "soft"),
        state(_status(run), good=run.phase != "failed", ended=ended if run.phase in ("done", "failed") else ""),
        f'<progress value="{run.step}" max="{max(run.steps, 1)}">{_percent(run)}</progress>',
        tiles(_figures(run)),
        chart_block(run_charts(run, [teacher.name for teacher in config.teachers]), run.events),
        *_predictions(run.predictions),
        heading("Where the time goes"),
        _time(run),
        *_teachers(run),
        heading("Settings"),
        facts(_settings(config)),
    )


def _percent(run: RunSnapshot) -> str:
    return f"{run.step / run.steps:.0%}" if run.steps else "0%"


def _description(config: TrainConfig) -> str:
    without = "itself" if config.self_teacher else "no teacher"
    names = ", ".join(teacher.name for teacher in config.teachers) or without
    student = f"{config.student.path} learns from {names}; K/V {config.kv.mode}, {config.student.mode} mode"
    return f"{student}; output: {config.run.output_dir}"


def _status(run: RunSnapshot) -> str:
    if run.phase == "failed":
        return f"Failed at step {run.step:,}: {run.problem}"
    if run.phase == "done":
        return f"Finished after {in_time(time.time() - run.started_at)}"
    doing = f" ({run.doing})" if run.doing else ""
    status = f"{_PHASES[run.phase]}{doing}, running for {in_time(time.time() - run.started_at)}"
    if run.last_step_at is None:
        return status
    return f"{status}; last step {in_time(time.time() - run.last_step_at)} ago"


def _figures(run: RunSnapshot) -> list[tuple[str, str, str]]:
    found = [("step", f"{run.step:,}", f"of {run.steps:,}")] if run.steps else []
    if run.eta_seconds is not None and run.phase not in ("done", "failed"):
        found.append(("time left", in_time(run.eta_seconds), "at the average pace"))
    for label, figure, note in (
        ("cross-entropy", "train/ce_loss", "training"),
        ("loss", "train/loss", "training; with the weighted KV loss"),
        ("KV loss", "train/kv_loss", "good below 0.5; check above 1.5"),
        ("KV weight", "train/kv_weight", "of the KV objective in the loss"),
        ("curriculum stage", "curriculum/stage", "steps of the reasoning that are latent"),
        ("samples/s", "train/samples_per_second", "of all ranks"),
    ):
        if figure in run.scalars:
            found.append((label, number(run.scalars[figure]), note))
    if "val/perplexity" in run.scalars:
        found.append(("perplexity", number(run.scalars["val/perplexity"]), "last validation"))
    if "val/task_metrics/accuracy" in run.scalars:
        found.append(("accuracy", f"{run.scalars['val/task_metrics/accuracy']:.1%}", "last validation"))
    if "kv/stall_fraction" in run.scalars:
        found.append(("stall", f"{run.scalars['kv/stall_fraction']:.1%}", "of the time, waiting for teachers"))
        found.append(("K/V per sample", in_bytes(run.scalars["kv/bytes_per_sample"]), "of all teachers, encoded"))
    if run.bottleneck is not None:
        found.append(("bottleneck", run.bottleneck, "longest stage of the last steps"))
    return found


def _predictions(predictions: Sequence[Prediction]) -> tuple[str, ...]:
    if not predictions:
        return ()
    rows = (
        (_cut(one.prompt), _cut(one.expected), _cut(one.answer), "yes" if one.correct else "no") for one in predictions
    )
    return heading("Answers in the last validation"), stack(("prompt", "expected", "answer", "correct"), rows)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _time(run: RunSnapshot) -> str:
    whole = sum(run.busy_seconds.values())
    if not whole:
        return paragraphs(["No step yet."])
    return shares({stage: seconds / whole for stage, seconds in run.busy_seconds.items()})


def _teachers(run: RunSnapshot) -> tuple[str, ...]:
    if not run.teachers:
        return ()
    problems = [
        f"{name}: {endpoint.endpoint} does not answer: {endpoint.problem}"
        for name, teacher in run.teachers.items()
        for endpoint in (teacher.health.endpoints if teacher.health else ())
        if endpoint.problem
    ]
    return (
        heading("Teachers"),
        stack(_TEACHERS, (_teacher(name, teacher) for name, teacher in run.teachers.items())),
        paragraphs(problems, "missed"),
        heading("Time per sample, by teacher"),
        stack(_STAGES, (_stages(name, teacher) for name, teacher in run.teachers.items())),
    )


def _teacher(name: str, teacher: TeacherView) -> tuple[str, ...]:
    sums, health = teacher.sums, teacher.health
    sent = (
        f"{sums.samples:,.0f}",
        f"{sums.missing:,.0f}",
        in_bytes(sums.encoded_bytes / sums.samples) if sums.samples else "-",
    )
    if health is None:
        return (name, "from the store", "-", "-", "-", "-", *sent)
    up = sum(endpoint.problem is None for endpoint in health.endpoints)
    return (
        name,
        f"{up} of {len(health.endpoints)} up",
        health.current,
        "never" if health.answered_s_ago is None else f"{in_time(health.answered_s_ago)} ago",
        str(health.retries),
        str(health.switches),
        *sent,
    )


def _stages(name: str, teacher: TeacherView) -> tuple[str, ...]:
    sums = teacher.sums
    stages = (*TEACHER_STAGES, "decode", "stall")
    return (name, *(number(1000 * sums.seconds[stage] / sums.samples) if sums.samples else "-" for stage in stages))


def _settings(config: TrainConfig) -> dict[str, object]:
    return {
        "selector": f"{config.kv.selection.selector}, budget {config.kv.selection.budget}",
        "codec": config.kv.codec.name,
        "fusion": config.fuse.kind,
        "KV loss": f"{config.loss.kv_loss}, weight {config.loss.kv_weight}",
        "learning rate": config.optim.lr,
        "batch": f"{config.run.global_batch}, {config.run.micro_batch} per rank at once",
        "ZeRO stage": config.run.zero_stage,
        "seed": config.run.seed,
    }

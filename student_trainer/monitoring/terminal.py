"""Live display of a run on a terminal, below its log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kvcore.monitoring.progress import logs_above
from kvcore.monitoring.units import in_bytes, in_time, number
from student_trainer.monitoring.run_state import RunSnapshot, RunState, TeacherView

REFRESHES_PER_SECOND = 2
_METRICS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("ce_loss", "train/ce_loss", "{:.4f}".format),
    ("kv_loss", "train/kv_loss", "{:.4f}".format),
    ("loss", "train/loss", "{:.4f}".format),
    ("kv_weight", "train/kv_weight", number),
    ("val/ce_loss", "val/ce_loss", "{:.4f}".format),
    ("accuracy", "val/task_metrics/accuracy", "{:.1%}".format),
    ("stall", "kv/stall_fraction", "{:.0%}".format),
    ("samples/s", "train/samples_per_second", number),
)


@contextlib.contextmanager
def on_terminal(state: RunState, name: str, *, enabled: bool, console: Console | None = None) -> Iterator[None]:
    """Shows a run while the block runs.

    Args:
        state: the run.
        name: its name.
        enabled: whether this rank shows anything.
        console: stderr by default. Nothing is drawn if it is not a terminal; the log then has progress lines.
    """
    console = console or Console(stderr=True)
    state.on_terminal = enabled and console.is_terminal
    if not state.on_terminal:
        yield
        return
    live = Live(
        get_renderable=lambda: render(state.snapshot(), name), console=console, refresh_per_second=REFRESHES_PER_SECOND
    )
    with live, logs_above():
        yield


def render(run: RunSnapshot, name: str) -> RenderableType:
    """Progress, metrics, and a line for each teacher."""
    teachers = Table.grid(padding=(0, 2))
    for teacher, view in run.teachers.items():
        teachers.add_row(Text(teacher, style="bold"), *_teacher(view))
    return Group(_progress(run, name), _metrics(run), teachers)


def _progress(run: RunSnapshot, name: str) -> Table:
    row = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=run.steps or None, completed=run.step, width=30, pulse=not run.steps)
    times = f"{in_time(time.time() - run.started_at)} so far"
    if run.eta_seconds is not None:
        times += f", {in_time(run.eta_seconds)} left"
    steps = f"step {run.step}/{run.steps}" if run.steps else ""
    row.add_row(Text(name, style="bold"), Text(run.doing or run.phase), bar, Text(steps), Text(times))
    return row


def _metrics(run: RunSnapshot) -> Text:
    shown = [f"{label} {form(run.scalars[name])}" for label, name, form in _METRICS if name in run.scalars]
    return Text("  ".join([*shown, *([f"bottleneck {run.bottleneck}"] if run.bottleneck else [])]))


def _teacher(teacher: TeacherView) -> list[Text]:
    health, sums = teacher.health, teacher.sums
    cells = [Text(in_bytes(sums.encoded_bytes), justify="right")]
    if teacher.weight is not None:
        cells.append(Text(f"weight {teacher.weight:.2f}"))
    if health is None:
        cells.append(Text("from the store", style="green"))
    else:
        down = [f"{one.endpoint}: {one.problem}" for one in health.endpoints if one.problem]
        up = len(health.endpoints) - len(down)
        style = "green" if not down else "yellow" if up else "red"
        answered = "never" if health.answered_s_ago is None else f"{in_time(health.answered_s_ago)} ago"
        cells += [Text(f"{up} of {len(health.endpoints)} up", style=style), Text(f"answered {answered}")]
        cells += [Text("; ".join(down), style=style, overflow="ellipsis", no_wrap=True)] if down else []
    if sums.missing:
        cells.append(Text(f"{sums.missing:,.0f} samples missing", style="yellow"))
    return cells

"""Tests of the live display of a run on a terminal."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from rich.console import Console

from student_trainer.kv_sources.kv_batch import STAGES, TeacherSums
from student_trainer.monitoring.run_state import RunState
from student_trainer.monitoring.terminal import on_terminal, render
from tests.support.begun_run import begun_run


@pytest.fixture
def run() -> RunState:
    """A run after one of ten steps. One teacher has a live and a dead replica, the other comes from a store."""
    figures = {"train/loss": 2.5, "train/kv_loss": 0.875, "kv/stall_fraction": 0.05, "routing/weights_mean/ben": 0.25}
    state = begun_run("[bold]ada", figures)
    state.account(4.0, {"stall": 1.0}, {"[bold]ada": TeacherSums(64, 3, 2_000_000.0, dict.fromkeys(STAGES, 0.1))})
    return state


def text_of(state: RunState, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(state.snapshot(), "night"))
    return console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]


def test_terminal_shows_progress_metrics_and_teachers(run: RunState) -> None:
    progress, figures, ada, ben = text_of(run, 160)
    assert progress.split()[:2] == ["night", "training"]
    assert "step 1/10" in progress
    assert progress.rstrip().endswith("left")
    assert figures == "kv_loss 0.8750  loss 2.5000  stall 5%  bottleneck train"
    assert ada.split("  ")[0] == "[bold]ada"
    for part in ("1 of 2 up", "3 samples missing", "0:00:00 ago", "2.0 MB", "dead:1: UNAVAILABLE: connection refused"):
        assert part in ada, part
    assert ben.split() == ["ben", "0.0", "kB", "weight", "0.25", "from", "the", "store"]


def test_display_fits_a_narrow_terminal_and_works_before_the_first_step(run: RunState) -> None:
    assert max(map(len, text_of(run, 60))) <= 60
    starting = " ".join(text_of(RunState(), 80))
    assert "starting" in starting
    assert "left" not in starting


def test_last_state_stays_on_the_terminal_below_the_log(run: RunState, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(screen)])
    console = Console(file=screen, force_terminal=True, width=120)
    with on_terminal(run, "night", enabled=True, console=console):
        assert run.on_terminal
        logging.getLogger("any").warning("checkpoint saved")
        run.stepped(2, 64)
    shown = screen.getvalue()
    assert shown.index("checkpoint saved") < shown.rindex("step 2/10")


@pytest.mark.parametrize(("terminal", "enabled"), [(False, True), (True, False)])
def test_nothing_is_drawn_without_a_terminal_or_on_other_ranks(run: RunState, terminal: bool, enabled: bool) -> None:
    screen = io.StringIO()
    with on_terminal(run, "night", enabled=enabled, console=Console(file=screen, force_terminal=terminal)):
        assert not run.on_terminal
    assert screen.getvalue() == ""

"""Tests of the progress of a run's long phases."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from kvcore.monitoring import progress
from student_trainer.monitoring.phase_progress import show_progress
from student_trainer.monitoring.run_state import RunState, current_run
from tests.support.training_parts import one_rank


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture
def run() -> Iterator[RunState]:
    state = RunState()
    token = current_run.set(state)
    yield state
    current_run.reset(token)


def test_progress_is_shown_until_the_last_batch(run: RunState) -> None:
    shown = [(item, run.doing) for item in show_progress("fitting", "abc")]
    assert shown == [("a", "fitting 0/3"), ("b", "fitting 1/3"), ("c", "fitting 2/3")]
    assert run.doing is None


def test_error_clears_the_progress(run: RunState) -> None:
    def work() -> None:
        for _ in show_progress("fitting", "abc"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert run.doing is None


@pytest.mark.parametrize(
    ("on_terminal", "lines"), [(False, ["fitting: 1/2, 0:00:20 left", "fitting: 2/2, 0:00:00 left"]), (True, [])]
)
def test_long_phases_are_logged_unless_a_terminal_shows_them(
    run: RunState,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    on_terminal: bool,
    lines: list[str],
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    run.on_terminal = on_terminal
    with caplog.at_level(logging.INFO):
        for _ in show_progress("fitting", "ab"):
            now += 20
    assert caplog.messages == lines


def test_show_progress_yields_all_items_without_a_run() -> None:
    assert list(show_progress("fitting", "ab")) == ["a", "b"]

"""How far a long part of a run is."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from kvcore.monitoring import progress
from student_trainer.monitoring.phase_progress import watched
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


def test_the_run_says_how_far_it_is_until_it_is_through(run: RunState) -> None:
    said = [(item, run.doing) for item in watched("fitting", "abc")]
    assert said == [("a", "fitting 0/3"), ("b", "fitting 1/3"), ("c", "fitting 2/3")]
    assert run.doing is None


def test_what_ends_in_an_error_is_no_longer_being_done(run: RunState) -> None:
    def work() -> None:
        for _ in watched("fitting", "abc"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert run.doing is None


@pytest.mark.parametrize(
    ("drawn", "lines"), [(False, ["fitting: 1/2, 0:00:20 left", "fitting: 2/2, 0:00:00 left"]), (True, [])]
)
def test_the_log_hears_of_what_takes_long_unless_a_terminal_shows_it(
    run: RunState, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, drawn: bool, lines: list[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    run.drawn = drawn
    with caplog.at_level(logging.INFO):
        for _ in watched("fitting", "ab"):
            now += 20
    assert caplog.messages == lines


def test_without_a_run_batches_pass_as_they_are() -> None:
    assert list(watched("fitting", "ab")) == ["a", "b"]

"""What rank 0 keeps of its run: progress, teachers, and where the time goes."""

from __future__ import annotations

import time

import pytest

from student_trainer.loop.metric_accumulator import STAGES, MetricAccumulator, TeacherSums, from_rows
from student_trainer.monitoring.run_state import MOST_POINTS, RunState, bottleneck
from tests.support.kv_fakes import MemorySource

BUSY = {"stall": 1.0, "decode": 0.5, "align": 0.1, "train": 3.0}


def sums(samples: float, **seconds: float) -> TeacherSums:
    return TeacherSums(samples, 1.0, 100.0, dict.fromkeys(STAGES, 0.0) | seconds)


@pytest.mark.parametrize(
    ("own", "stages", "longest"),
    [
        (BUSY, {"prefill": 99.0}, "train"),
        (BUSY | {"stall": 4.0}, {"queue": 1.0, "prefill": 9.0}, "prefill"),
        (BUSY | {"stall": 4.0}, {"queue": 9.0, "stall": 99.0}, "queue"),
        (BUSY | {"stall": 4.0}, {"network": 0.1}, "network"),
        (BUSY | {"stall": 4.0}, {"queue": 0.0}, "store"),
        (BUSY | {"decode": 5.0}, {"encode": 9.0}, "decode"),
        (BUSY | {"align": 7.0}, {"encode": 9.0}, "align"),
    ],
)
def test_the_bottleneck_is_the_stage_that_time_went_to_and_a_stall_is_the_teachers(
    own: dict[str, float], stages: dict[str, float], longest: str
) -> None:
    assert bottleneck(own, stages) == longest


def test_time_adds_up_by_stage_and_training_has_the_rest() -> None:
    state = RunState()
    state.connected({"ada": MemorySource()})
    for _ in range(2):
        state.account(10.0, {"stall": 3.0, "decode": 1.0, "align": 0.5, "prefill": 30.0}, {"ada": sums(4, queue=2.0)})
    run = state.snapshot()
    assert run.busy_seconds == {"stall": 6.0, "decode": 2.0, "align": 1.0, "train": 11.0}
    assert (run.teachers["ada"].sums.samples, run.teachers["ada"].sums.missing) == (8, 2)
    assert run.teachers["ada"].sums.seconds["queue"] == 4.0
    assert run.bottleneck == "train"


def test_the_time_left_follows_the_pace_since_the_run_went_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    state = RunState()
    state.begin(steps=50, first_step=40)
    assert state.eta_seconds is None
    clock[0] += 8.0
    state.stepped(42, samples=64)
    assert state.eta_seconds == pytest.approx(8.0 / 2 * 8)
    assert (state.snapshot().step, state.snapshot().samples) == (42, 64)


def test_curves_keep_their_ends_however_long_the_run_is() -> None:
    state = RunState()
    last = 3 * MOST_POINTS
    for step in range(last + 1):
        state.log(step, {"train/loss": float(step)})
    points = state.snapshot().history["train/loss"]
    assert MOST_POINTS // 2 <= len(points) <= MOST_POINTS
    assert (points[0], points[-1]) == ((0, 0.0), (last, float(last)))


def test_a_phase_ends_where_it_began_and_an_error_leaves_it_to_be_seen() -> None:
    state = RunState()
    with state.during("training"):
        with state.during("validating"):
            assert state.phase == "validating"
        assert state.phase == "training"
    with pytest.raises(RuntimeError), state.during("saving"):
        raise RuntimeError
    assert state.phase == "saving"


def test_what_teachers_sent_survives_the_collective_and_absent_ones_are_zero() -> None:
    window = MetricAccumulator(seconds=4.0, micro_batches=2)
    window.teachers["ben"] = sums(6, stall=2.0, prefill=1.5)
    window.stages = {"prefill": 1.5, "stall": 2.0}
    by_teacher = from_rows(["ada", "ben"], [2 * number for number in window.teacher_rows(["ada", "ben"])])
    assert by_teacher["ada"] == TeacherSums()
    assert by_teacher["ben"].seconds["stall"] == 4.0
    figures = window.figures(by_teacher, world_size=2)
    assert figures["kv/stall_fraction"] == 4.0 / 2 / 4.0
    assert figures["kv/bytes_per_sample"] == pytest.approx(200.0 / 12 * 2)
    assert figures["kv/missing_samples"] == 2.0
    assert (figures["kv/prefill_s"], figures["kv/stall_s"]) == (0.75, 1.0)

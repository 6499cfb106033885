"""Tests of the run state on rank 0: progress, teachers, and time per stage."""

from __future__ import annotations

import time

import pytest

from student_trainer.kv_sources.kv_batch import STAGES, TeacherSums
from student_trainer.loop.metric_accumulator import MetricAccumulator
from student_trainer.monitoring.run_state import MAX_POINTS, RunState, bottleneck
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
def test_bottleneck_is_the_longest_stage_and_stalls_count_for_the_teachers_longest_stage(
    own: dict[str, float], stages: dict[str, float], longest: str
) -> None:
    assert bottleneck(own, stages) == longest


def test_time_is_summed_by_stage_and_the_rest_is_training() -> None:
    state = RunState()
    state.connected({"ada": MemorySource()})
    for _ in range(2):
        state.account(10.0, {"stall": 3.0, "decode": 1.0, "align": 0.5, "prefill": 30.0}, {"ada": sums(4, queue=2.0)})
    run = state.snapshot()
    assert run.busy_seconds == {"stall": 6.0, "decode": 2.0, "align": 1.0, "train": 11.0}
    assert (run.teachers["ada"].sums.samples, run.teachers["ada"].sums.missing) == (8, 2)
    assert run.teachers["ada"].sums.seconds["queue"] == 4.0
    assert run.bottleneck == "train"


def test_eta_follows_the_pace_since_the_run_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    state = RunState()
    state.begin(steps=50, first_step=40)
    assert state.eta_seconds is None
    clock[0] += 8.0
    state.stepped(42, samples=64)
    assert state.eta_seconds == pytest.approx(8.0 / 2 * 8)
    assert (state.snapshot().step, state.snapshot().samples) == (42, 64)


def test_thinned_curves_keep_their_first_and_last_points() -> None:
    state = RunState()
    last = 3 * MAX_POINTS
    for step in range(last + 1):
        state.log(step, {"train/loss": float(step)})
    points = state.snapshot().history["train/loss"]
    assert MAX_POINTS // 2 <= len(points) <= MAX_POINTS
    assert (points[0], points[-1]) == ((0, 0.0), (last, float(last)))


def test_previous_phase_is_restored_except_after_an_error() -> None:
    state = RunState()
    with state.during("training"):
        with state.during("validating"):
            assert state.phase == "validating"
        assert state.phase == "training"
    with pytest.raises(RuntimeError), state.during("saving"):
        raise RuntimeError
    assert state.phase == "saving"


def test_teacher_sums_are_reduced_and_absent_teachers_are_zero() -> None:
    metrics = MetricAccumulator(seconds=4.0, micro_batches=2)
    metrics.add_teacher("ben", sums(6, stall=2.0, prefill=1.5))
    ada, ben = ([2 * number for number in row] for row in metrics.teacher_rows(["ada", "ben"]))
    by_teacher = {"ada": TeacherSums.from_row(ada), "ben": TeacherSums.from_row(ben)}
    assert by_teacher["ada"] == TeacherSums()
    assert by_teacher["ben"].seconds["stall"] == 4.0
    figures = metrics.figures(by_teacher, world_size=2)
    assert figures["kv/stall_fraction"] == 4.0 / 2 / 4.0
    assert figures["kv/bytes_per_sample"] == pytest.approx(200.0 / 12 * 2)
    assert figures["kv/missing_samples"] == 2.0
    assert (figures["kv/prefill_s"], figures["kv/stall_s"], figures["kv/align_s"]) == (0.75, 1.0, 0.0)


def test_teacher_sums_are_restored_from_their_row() -> None:
    seconds = {stage: float(number) for number, stage in enumerate(STAGES)}
    whole = TeacherSums(1.0, 2.0, 3.0, seconds, raw_bytes=4.0, tokens=5.0)
    assert TeacherSums.from_row(whole.row()) == whole
    assert whole + whole == TeacherSums.from_row([2 * number for number in whole.row()])

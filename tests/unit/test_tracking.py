"""Tests of the metrics on disk and in the progress line."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest

from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.monitoring.run_state import RunState
from student_trainer.monitoring.tracking import Tracker, peak_memory_mb
from tests.support.scripted_replica import ScriptedReplica

LINES = "metrics.jsonl"


def tracked(output: Path, steps: list[int], *, first_step: int = 0, enabled: bool = True) -> None:
    tracker = Tracker(output, 10, enabled=enabled, first_step=first_step)
    for step in steps:
        tracker.log(step, {"train/loss": step / 2})
    tracker.close()


def logged(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / LINES).read_text(encoding="utf-8").splitlines()]


def test_metrics_are_written_to_json_lines_and_tensorboard(tmp_path: Path) -> None:
    tracked(tmp_path, [1, 2])
    assert logged(tmp_path) == [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": 1.0}]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_resumed_run_replaces_lines_after_its_first_step(tmp_path: Path) -> None:
    tracked(tmp_path, [1, 2, 3, 4])
    tracked(tmp_path, [3, 4, 5], first_step=2)
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3, 4, 5]


def test_run_that_starts_over_drops_all_lines(tmp_path: Path) -> None:
    tracked(tmp_path, [1, 2])
    tracked(tmp_path, [1], first_step=0)
    assert [line["step"] for line in logged(tmp_path)] == [1]


def test_run_with_an_incomplete_line_can_resume(tmp_path: Path) -> None:
    tracked(tmp_path, [1, 2, 3])
    whole = (tmp_path / LINES).read_text(encoding="utf-8")
    (tmp_path / LINES).write_text(whole[:-9], encoding="utf-8")
    tracked(tmp_path, [3], first_step=2)
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracked(tmp_path / "out", [1], enabled=False)
    assert not (tmp_path / "out").exists()


def test_progress_line_shows_losses_stall_speed_and_time_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(tmp_path, 10, enabled=True, first_step=2)
    figures = {"train/loss": 1.5, "train/ce_loss": 1.0, "train/kv_loss": 0.5, "train/samples_per_second": 64.0}
    with caplog.at_level(logging.INFO):
        tracker.progress(10, figures | {"kv/stall_fraction": 0.25})
    tracker.close()
    assert caplog.messages == ["step 10/10  loss 1.5000  ce 1.0000  kv 0.5000  stall 25%  64 samples/s  ETA 0:00:00"]


def test_progress_line_lists_teachers_with_failed_replicas_unless_a_terminal_shows_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dead, alive, other = (ScriptedReplica(name) for name in ("dead:1", "alive:2", "other:3"))
    dead.up = False
    ada, ben = FailoverSource("ada", [dead, alive], patience_s=5.0), FailoverSource("ben", [other], patience_s=5.0)
    ada.connect()
    ben.connect()
    state = RunState()
    state.connected({"ada": ada, "ben": ben})
    tracker = Tracker(tmp_path, 10, enabled=True, first_step=0, state=state)
    with caplog.at_level(logging.INFO, "student_trainer.monitoring.tracking"):
        tracker.progress(1, {"train/samples_per_second": 64.0})
        state.on_terminal = True
        tracker.progress(2, {"train/samples_per_second": 64.0})
    tracker.close()
    (line,) = [record.message for record in caplog.records if record.name == "student_trainer.monitoring.tracking"]
    assert line.endswith("  ada 1/2 up")


def test_resumed_run_continues_its_curves_without_current_values(tmp_path: Path) -> None:
    tracked(tmp_path, [1, 2, 3])
    state = RunState()
    tracker = Tracker(tmp_path, 10, enabled=True, first_step=2, state=state)
    assert state.snapshot().history == {"train/loss": [(1, 0.5), (2, 1.0)]}
    assert state.snapshot().scalars == {}
    tracker.log(3, {"train/loss": 9.0})
    tracker.close()
    assert state.snapshot().history["train/loss"][-2:] == [(2, 1.0), (3, 9.0)]


def test_non_finite_values_are_omitted(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 10, enabled=True, first_step=0)
    tracker.log(1, {"train/loss": math.nan, "train/kv_loss": math.inf, "train/lr": 0.5})
    tracker.close()
    assert (tmp_path / LINES).read_text(encoding="utf-8") == '{"step": 1, "train/lr": 0.5}\n'
    assert tracker.state.snapshot().scalars == {"train/lr": 0.5}


def test_peak_memory_is_in_mebibytes() -> None:
    assert 10 < peak_memory_mb() < 2**20

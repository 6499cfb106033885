"""Tests of the metrics on disk and in the progress line."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.monitoring.run_state import RunState
from student_trainer.monitoring.tensorboard import add_scores
from student_trainer.monitoring.tracking import Tracker
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


def test_tensorboard_has_the_names_of_the_guide(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 10, enabled=True, first_step=0)
    tracker.log(4, {"val/task_metrics/accuracy": 0.25, "routing/weights_mean/ada": 0.75})
    tracker.log(4, {"routing/weights_mean/ben": 0.5})
    tracker.close()
    board = tmp_path / "tensorboard"
    assert curves(board) == {
        "val/task_metrics/accuracy": [(4, 0.25)],
        "val/task_metrics": [(4, 0.25)],
        "routing/weights_mean/ada": [(4, 0.75)],
        "routing/weights_mean/ben": [(4, 0.5)],
    }
    assert curves(board / "ada") == {"routing/weights_mean": [(4, 0.75)]}
    assert curves(board / "ben") == {"routing/weights_mean": [(4, 0.5)]}


def test_benchmark_scores_reach_tensorboard_at_the_best_step(tmp_path: Path) -> None:
    add_scores(tmp_path, {"gsm8k": 40.0})
    assert not list(tmp_path.iterdir()), "a directory without a run"
    tracked(tmp_path, [1, 2])
    (tmp_path / "summary.json").write_text('{"best_step": 2}', encoding="utf-8")
    add_scores(tmp_path, {"gsm8k": 40.0})
    assert curves(tmp_path / "tensorboard")["eval/gsm8k"] == [(2, 40.0)]


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of each point, as TensorBoard reads them from the event files of one directory."""
    board = EventAccumulator(str(directory))
    board.Reload()
    return {name: [(one.step, one.value) for one in board.Scalars(name)] for name in board.Tags()["scalars"]}


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
        tracker.progress(10, figures | {"train/kv_weight": 94.25, "kv/stall_fraction": 0.25})
    tracker.close()
    losses = "ce_loss 1.0000  kv_loss 0.5000  loss 1.5000  kv_weight 94.2"
    assert caplog.messages == [f"step 10/10  {losses}  stall 25%  64 samples/s  ETA 0:00:00"]


@pytest.mark.parametrize(("rate", "shown"), [(0.0331, "0.0331"), (0.26, "0.26"), (7.25, "7.25"), (1210.4, "1,210")])
def test_slow_training_has_a_speed_that_is_not_zero(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rate: float, shown: str
) -> None:
    tracker = Tracker(tmp_path, 10, enabled=True, first_step=0)
    with caplog.at_level(logging.INFO):
        tracker.progress(10, {"train/samples_per_second": rate})
    tracker.close()
    assert f"  {shown} samples/s  " in caplog.text


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

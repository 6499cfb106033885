"""Tests of experiment trackers, with the real packages: Weights & Biases offline, and MLflow with files."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kvcore.config import parse
from kvcore.errors import FieldError
from student_trainer import config_checks
from student_trainer.config import TrainConfig
from student_trainer.monitoring.trackers import RUN_IDS, open_trackers
from student_trainer.monitoring.tracking import Tracker

TOKEN = "s3cret-token-of-the-servers"


def settings(output: Path, *trackers: str) -> TrainConfig:
    config: dict[str, Any] = {
        "student": {"path": str(output)},
        "teachers": [{"name": "ada", "endpoints": ["127.0.0.1:5001"]}],
        "data": {"train": str(output / "train.jsonl")},
        "run": {"output_dir": str(output / "run"), "steps": 4, "trackers": trackers},
    }
    return parse(config, TrainConfig)


def tracked(config: TrainConfig, steps: list[int], first_step: int = 0) -> None:
    trackers = open_trackers(config, first_step)
    tracker = Tracker(config.run.output_dir, 4, enabled=True, first_step=first_step, trackers=trackers)
    try:
        for step in steps:
            tracker.log(step, {"train/loss": step / 2, "val/ce_loss": float("nan")})
    finally:
        tracker.close()


def needs_package(name: str) -> pytest.MarkDecorator:
    found = importlib.util.find_spec(name) is not None
    return pytest.mark.skipif(not found, reason=f"pip install 'kvdistill[{name}]'")


@pytest.fixture
def mlflow_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - optional

    return MlflowClient()


def mlflow_runs(client: Any) -> list[Any]:
    experiment = client.get_experiment_by_name("kvdistill")
    return client.search_runs([experiment.experiment_id])


@needs_package("mlflow")
@pytest.mark.filterwarnings("ignore::FutureWarning:mlflow", "ignore::DeprecationWarning")
def test_mlflow_gets_settings_and_metrics_and_a_resumed_run_continues(tmp_path: Path, mlflow_client: Any) -> None:
    config = settings(tmp_path, "mlflow")
    tracked(config, [1, 2])
    tracked(config, [3, 4], first_step=2)
    (run,) = mlflow_runs(mlflow_client)
    assert run.info.status == "FINISHED"
    assert run.data.params["run.steps"] == "4"
    assert json.loads(run.data.params["teachers"])[0]["endpoints"] == ["127.0.0.1:5001"]
    history = mlflow_client.get_metric_history(run.info.run_id, "train/loss")
    assert {metric.step: metric.value for metric in history} == {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0}
    assert set(run.data.metrics) == {"train/loss"}, "a metric that is not finite is left out"


@needs_package("mlflow")
@pytest.mark.filterwarnings("ignore::FutureWarning:mlflow", "ignore::DeprecationWarning")
def test_mlflow_marks_a_failed_run_and_a_new_run_is_another_one(tmp_path: Path, mlflow_client: Any) -> None:
    config = settings(tmp_path, "mlflow")
    tracker = Tracker(tmp_path, 4, enabled=True, first_step=0, trackers=open_trackers(config, 0))

    def fail() -> None:
        try:
            raise InterruptedError("stopped")
        finally:
            tracker.close()

    with pytest.raises(InterruptedError, match="stopped"):
        fail()
    tracked(config, [1])
    assert sorted(run.info.status for run in mlflow_runs(mlflow_client)) == ["FAILED", "FINISHED"]


@needs_package("wandb")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_gets_settings_and_metrics_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("KVDISTILL_TOKEN", TOKEN)
    import wandb  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - optional

    config = settings(tmp_path, "wandb")
    try:
        tracked(config, [1, 2])
        tracked(config, [3], first_step=2)
    finally:
        wandb.teardown()
    logs = sorted(config.run.output_dir.glob("wandb/offline-run-*/*.wandb"))
    run_id = json.loads((config.run.output_dir / RUN_IDS).read_text())["wandb"]
    assert len(logs) == 2
    assert all(run_id in log.name for log in logs), "a resumed run keeps its id"
    content = logs[0].read_bytes()
    assert b"train/loss" in content
    assert b"zero_stage" in content
    assert b"val/ce_loss" not in content
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in files)


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_checks, "check_model", lambda *_: None)
    monkeypatch.setattr(config_checks, "missing", lambda extra: [extra])
    with pytest.raises(FieldError, match=r"run.trackers: 'mlflow' needs mlflow.*pip install 'kvdistill\[mlflow\]'"):
        config_checks.check_inputs(settings(tmp_path, "mlflow"))


class Broken:
    """A service that went away after the start."""

    id = "1"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        raise ConnectionError(f"no answer for {len(metrics)} metrics")

    def close(self, *, failed: bool) -> None:
        raise ConnectionError(f"no answer, failed: {failed}")


def test_a_tracker_that_fails_later_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(tmp_path, 4, enabled=True, first_step=0, trackers={"wandb": Broken()})
    with caplog.at_level(logging.WARNING):
        tracker.log(1, {"train/loss": 0.5})
        tracker.close()
    assert [record.getMessage() for record in caplog.records] == [
        "run.trackers: 'wandb' lost the metrics of step 1: no answer for 1 metrics",
        "run.trackers: 'wandb' may lack metrics: no answer, failed: False",
    ]
    assert "train/loss" in (tmp_path / "metrics.jsonl").read_text()

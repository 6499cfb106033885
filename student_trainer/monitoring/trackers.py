"""Experiment trackers that get a run's metrics beside its own files: Weights & Biases and MLflow.

Each is set up by its own environment variables, such as WANDB_PROJECT, WANDB_MODE and MLFLOW_TRACKING_URI. A run that
resumes continues the same run of the tracker.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from kvcore.errors import FieldError
from kvcore.files import write_json
from student_trainer.config import TrainConfig

logger = logging.getLogger(__name__)

# In a run's directory: the id that each tracker gave to the run.
RUN_IDS = "trackers.json"
# The project or experiment, if the environment names none.
_PROJECT = "kvdistill"
# MLflow accepts up to 100 parameters per request, each of up to 6000 characters.
_PARAMS, _PARAM_LENGTH = 100, 6000


class ExperimentTracker(Protocol):
    """One run at a tracking service. `id`: by which the service finds it again."""

    id: str

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds finite metrics of one step."""
        ...

    def close(self, *, failed: bool) -> None:
        """Sends what is left, and marks the run as finished or failed."""
        ...


class WandbTracker:
    """A run at Weights & Biases, or in `<output_dir>/wandb` with WANDB_MODE=offline."""

    def __init__(self, config: TrainConfig, run_id: str | None) -> None:
        import wandb  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - optional, and slow to import

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=str(config.run.output_dir),
            dir=str(config.run.output_dir),
            id=run_id,
            resume="allow",
            config=config.model_dump(mode="json"),
            # Source code, git's remote and the terminal are not the tracker's business.
            settings=wandb.Settings(save_code=False, disable_git=True, console="off", silent=True),
        )
        self.id = str(self._run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds finite metrics of one step."""
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        """Sends what is left, and marks the run as finished or failed."""
        self._run.finish(exit_code=int(failed))


class MlflowTracker:
    """A run at the MLflow server of MLFLOW_TRACKING_URI. A thread of MLflow's sends the metrics."""

    def __init__(self, config: TrainConfig, run_id: str | None) -> None:
        from mlflow import MlflowClient  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - optional
        from mlflow.entities import Param  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

        self._client: Any = MlflowClient()
        self._sent: list[Any] = []
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            self.id = run_id
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        run = self._client.create_run(experiment_id, run_name=str(config.run.output_dir))
        self.id = str(run.info.run_id)
        params = [Param(key, value[:_PARAM_LENGTH]) for key, value in _flat(config.model_dump(mode="json")).items()]
        for start in range(0, len(params), _PARAMS):
            self._client.log_batch(self.id, params=params[start : start + _PARAMS])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds finite metrics of one step."""
        from mlflow.entities import Metric  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

        now = int(1000 * time.time())
        entries = [Metric(name, value, now, step) for name, value in metrics.items()]
        # A server that does not answer must not block the ranks.
        self._sent.append(self._client.log_batch(self.id, metrics=entries, synchronous=False))

    def close(self, *, failed: bool) -> None:
        """Sends what is left, and marks the run as finished or failed."""
        for sent in self._sent:
            sent.wait()
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


_TRACKERS: dict[str, type[WandbTracker | MlflowTracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}


def open_trackers(config: TrainConfig, first_step: int) -> dict[str, ExperimentTracker]:
    """The trackers of `run.trackers` by name, for rank 0. A run that resumes keeps its runs at the trackers.

    Raises:
        FieldError: a tracker cannot be used.
    """
    directory = config.run.output_dir
    ids = _run_ids(directory / RUN_IDS) if first_step > 0 else {}
    found: dict[str, ExperimentTracker] = {}
    directory.mkdir(parents=True, exist_ok=True)
    for name in config.run.trackers:
        try:
            found[name] = _TRACKERS[name](config, ids.get(name))
        except Exception as error:  # Trackers have no common errors.
            close_trackers(found, failed=True)
            reason = " ".join(str(error).split())
            problem = f"'{name}' cannot be used: {reason}; check its environment variables, or leave it out"
            raise FieldError("run.trackers", problem) from error
    if found:
        write_json(directory / RUN_IDS, ids | {name: tracker.id for name, tracker in found.items()})
    return found


def log_to(trackers: Mapping[str, ExperimentTracker], step: int, metrics: Mapping[str, float]) -> None:
    """Sends finite metrics to all trackers. One that fails is logged: the run's own files have all metrics."""
    for name, tracker in trackers.items():
        try:
            tracker.log(step, metrics)
        except Exception as error:  # noqa: BLE001 - trackers have no common errors
            logger.warning("run.trackers: '%s' lost the metrics of step %d: %s", name, step, error)


def close_trackers(trackers: Mapping[str, ExperimentTracker], *, failed: bool) -> None:
    """Closes all trackers. One that fails is logged: the run's own files have all metrics."""
    for name, tracker in trackers.items():
        try:
            tracker.close(failed=failed)
        except Exception as error:  # noqa: BLE001 - trackers have no common errors
            logger.warning("run.trackers: '%s' may lack metrics: %s", name, error)


def _run_ids(path: Path) -> dict[str, str]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings by their dotted names. A list is one value."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return flat

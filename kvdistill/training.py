"""Trains a student from Python."""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcore.config import load_config as load_file
from kvcore.config import parse
from kvcore.extras import require
from student_trainer.config import BEST_MODEL, TrainConfig
from student_trainer.config_checks import check_inputs


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run, or its last stage if it has `stages`.

    `output_dir`: the directory of the run's files. `best_model`: the directory of the student, for `load_student`.
    `metrics`: the contents of `summary.json`: steps, best step, validation accuracy, KV loss, speed.
    """

    output_dir: Path
    best_model: Path
    metrics: Mapping[str, Any]


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """Reads a run's YAML file.

    Args:
        path: the file.
        overrides: `key.path=value`, as `kvdistill train` takes them after `--set`.

    Raises:
        ConfigError: the file is missing or is no YAML mapping.
        FieldError: a key is unknown, has the wrong type, or is out of range.
    """
    return load_file(Path(path), overrides, TrainConfig)


def train(config: TrainConfig | Mapping[str, Any] | str | Path) -> TrainResult:
    """Trains like `kvdistill train`: from the newest checkpoint if there is one, to the end.

    Runs in this process, as the only rank or as one of those that torchrun or deepspeed started. Call it from the main
    thread, because SIGTERM and SIGINT save a checkpoint and end the run.

    Args:
        config: a configuration, a mapping with the keys of docs/configuration.md, or the path of a YAML file.

    Raises:
        ConfigError: the configuration or a path in it is invalid, or the extra `train` is not installed.
        TeacherError: a teacher cannot be reached or refuses a request.
        KVDistillError: the run was interrupted or diverged; the message says from where it can resume.
    """
    settings = _settings(config)
    require("train", "kvdistill.train")
    check_inputs(settings)
    from student_trainer.loop import ds_engine, trainer  # noqa: PLC0415 - torch is slow to import

    # DeepSpeed cannot join a second process group, so later runs of this process reuse the first one.
    atexit.unregister(ds_engine.stop)
    atexit.register(ds_engine.stop)
    metrics = trainer.train(settings)
    last = settings.stage(len(settings.stages) - 1) if settings.stages else settings
    return TrainResult(last.run.output_dir, last.run.output_dir / BEST_MODEL, metrics)


def _settings(config: TrainConfig | Mapping[str, Any] | str | Path) -> TrainConfig:
    if isinstance(config, TrainConfig):
        return config
    return load_config(config) if isinstance(config, str | Path) else parse(config, TrainConfig)

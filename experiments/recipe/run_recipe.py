"""Runs the recipe on one rank. Rank 0 first prepares the data and starts the teachers."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import yaml

from experiments.recipe.build import DataFiles, train_config
from experiments.recipe.config import RecipeSettings
from experiments.recipe.early_checks import check_data, check_models, check_servers
from kvcore.early_checks import check_output
from kvcore.errors import ConfigError, KVDistillError
from student_trainer.config import TrainConfig
from student_trainer.launching.endpoints import read_endpoints, teacher_names
from student_trainer.launching.local_teachers import LocalTeachers

# `kvdistill train --config` on this file repeats the run.
CONFIG = "run.yaml"
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_PLACEHOLDER = "127.0.0.1:1"


def run(settings: RecipeSettings) -> None:
    """Prepares the data, starts teachers unless endpoints are given, and trains.

    Raises:
        ConfigError: settings are inconsistent, or a dataset or a model cannot be loaded.
        KVDistillError: a teacher or the training failed.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    data = DataFiles.under(settings.output_dir / "data")
    check_output(settings.output_dir, "--output_dir")
    given_endpoints = check(settings, data, world_size)
    if not (given_endpoints or settings.kv_mode == "offline" or settings.prepare_only):
        check_servers(settings, settings.teacher_device)
    # Imported late, so that wrong settings are reported before torch is loaded.
    from experiments.recipe.prepare import prepare_data  # noqa: PLC0415

    if settings.prepare_only:
        prepare_data(settings, data.train.parent)
        return
    from student_trainer.loop import (  # noqa: PLC0415
        ds_engine,
        trainer,
    )
    from student_trainer.loop.rank_failures import fail_together  # noqa: PLC0415

    with ExitStack() as until_trained:
        until_trained.callback(ds_engine.stop)
        rank, world_size = ds_engine.start(settings.seed)
        failure: KVDistillError | None = None
        try:
            if rank == 0:
                prepare_data(settings, data.train.parent)
                endpoints = given_endpoints or _start_teachers(settings, until_trained)
                _write(train_config(settings, endpoints, data, world_size))
        except KVDistillError as error:
            failure = error
        fail_together(failure)
        trainer.main(settings.output_dir / CONFIG, [])


def check(settings: RecipeSettings, data: DataFiles, world_size: int) -> dict[str, list[str]]:
    """Checks the settings, for this or another machine, before anything is loaded; returns the given endpoints.

    Raises:
        ConfigError: settings are inconsistent.
    """
    check_models(settings)
    check_data(settings)
    if settings.teacher_endpoints:
        found = read_endpoints(settings.teacher_endpoints, settings.teachers)
        train_config(settings, found, data, world_size)
        return found
    if settings.kv_mode != "offline" and world_size > int(os.environ.get("LOCAL_WORLD_SIZE", world_size)):
        raise ConfigError(
            "--teacher_endpoints: is required with several nodes, since ranks on other nodes cannot reach servers that "
            "this command starts"
        )
    placeholders = {name: [_PLACEHOLDER] for name in teacher_names(settings.teachers)}
    train_config(settings, placeholders, data, world_size)
    return {}


def serve_flags(settings: RecipeSettings) -> dict[str, object]:
    """The flags of `kvdistill serve` for all teachers."""
    quantised = settings.load_in_8bit or settings.load_in_4bit
    return {
        "dtype": DTYPES[settings.bnb_4bit_compute_dtype] if quantised else "auto",
        "load_in_8bit": settings.load_in_8bit,
        "load_in_4bit": settings.load_in_4bit,
    }


def _start_teachers(settings: RecipeSettings, until_trained: ExitStack) -> Mapping[str, Sequence[str]]:
    if settings.kv_mode == "offline":
        return {}
    servers = LocalTeachers(
        teacher_names(settings.teachers),
        settings.output_dir / "logs",
        device=settings.teacher_device,
        options=serve_flags(settings),
    )
    return {name: [endpoint] for name, endpoint in until_trained.enter_context(servers).items()}


def _write(config: TrainConfig) -> None:
    directory = config.run.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    (directory / CONFIG).write_text(text, encoding="utf-8")

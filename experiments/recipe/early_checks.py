"""Checks, without torch, that data and models exist and that this machine can run them."""

from __future__ import annotations

from pathlib import Path

from data.families import CHINESE, FAMILIES
from experiments.recipe.config import MIX, RecipeSettings
from kvcore.early_checks import check_device, check_model, check_quantised
from kvcore.errors import ConfigError, FieldError


def check_models(settings: RecipeSettings) -> None:
    """Checks the student, and the teachers that are served from here.

    Raises:
        FieldError: names the flag and the path.
    """
    check_model(settings.student_model_name_or_path, "--student_model_name_or_path")
    if settings.kv_mode != "offline" and not settings.teacher_endpoints:
        for model in settings.teachers:
            check_model(model, "--teacher_models", teacher=True)


def check_servers(settings: RecipeSettings, device: str) -> None:
    """Checks that servers on this machine can have the device and quantised weights.

    Raises:
        FieldError: names the flag.
    """
    check_device(device, "--teacher_device")
    for field in ("load_in_8bit", "load_in_4bit"):
        if getattr(settings, field):
            check_quantised(device, f"--{field}")


def check_data(settings: RecipeSettings) -> None:
    """Checks the names of datasets, or the directory of the data.

    Raises:
        ConfigError: a dataset is unknown or the directory lacks a split.
    """
    names = settings.dataset_name
    if given_splits(settings):
        return
    if MIX in names and len(names) > 1:
        raise ConfigError(f"--dataset_name: {MIX} is already a mix; give it alone, or give datasets without it")
    for name in names:
        if name not in (MIX, CHINESE):
            try:
                FAMILIES.check(name)
            except ConfigError as error:
                raise FieldError("--dataset_name", str(error)) from error


def given_splits(settings: RecipeSettings) -> dict[str, Path]:
    """The paths of `train` and `val` if `dataset_name` is a directory; empty if it names datasets.

    Raises:
        ConfigError: the directory does not exist or lacks a split.
    """
    names = settings.dataset_name
    directory = Path(names[0])
    if len(names) > 1 or not directory.is_dir():
        if len(names) == 1 and ("/" in names[0] or names[0].startswith(".")):
            raise ConfigError(f"--dataset_name: there is no directory '{names[0]}'; it should contain train and val")
        return {}
    return {name: _split(directory, name) for name in ("train", "val")}


def _split(directory: Path, name: str) -> Path:
    """The path of a saved dataset or of a JSON Lines file."""
    for path in (directory / name, directory / f"{name}.jsonl"):
        if path.exists():
            return path
    raise ConfigError(f"--dataset_name: {directory} has neither {name} (a saved dataset) nor {name}.jsonl")

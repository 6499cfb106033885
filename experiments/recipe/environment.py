"""The environment variables of the job scripts, and the flags that they set. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.recipe.config import RecipeSettings
from kvcore.config import Variable
from kvcore.errors import ConfigError
from kvcore.flags import is_list

# The flag that each variable sets. An unset or empty variable leaves the default.
VARIABLES: Mapping[str, str] = {"CONFIG": "config"} | {
    variable.name: name
    for name, field in RecipeSettings.model_fields.items()
    for variable in field.metadata
    if isinstance(variable, Variable)
}
# Variables that hold several values, separated by spaces.
LISTS = {name for name, flag in VARIABLES.items() if flag != "config" and is_list(RecipeSettings.model_fields[flag])}
# Variable with more flags, as on the command line.
EXTRA = "EXTRA_ARGS"


@dataclass(frozen=True, slots=True)
class JobSettings:
    """How a job uses its nodes.

    Attributes:
        gpus: GPUs per node, 0 for CPUs.
        replicas: servers per teacher.
        ranks_per_node: training processes per node, or None for one per GPU.
        log_dir: directory for each job's folder of logs.
    """

    gpus: int
    replicas: int
    ranks_per_node: int | None
    log_dir: Path


def recipe_flags(environment: Mapping[str, str]) -> list[str]:
    """The recipe's flags that the variables set.

    Raises:
        ConfigError: TEACHERS and TEACHER_MODELS name different teachers.
    """
    named = {environment[name] for name in ("TEACHERS", "TEACHER_MODELS") if environment.get(name)}
    if len(named) > 1:
        raise ConfigError("TEACHERS and TEACHER_MODELS are the same setting but differ: set one of them")
    flags: list[str] = []
    for name, flag in VARIABLES.items():
        if value := environment.get(name):
            flags += [f"--{flag}", *(value.split() if name in LISTS else [value])]
    return flags + shlex.split(environment.get(EXTRA, ""))


def job_settings(environment: Mapping[str, str], *, local: bool) -> JobSettings:
    """Reads how the job uses its nodes: DEVICE, TEACHER_REPLICAS, RANKS_PER_NODE and LOG_DIR.

    Raises:
        ConfigError: a variable's value is invalid.
    """
    device = environment.get("DEVICE") or "auto"
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"DEVICE: expected auto, cpu or cuda; got '{device}'")
    gpus = 0 if device == "cpu" else _gpus_here() if local else _count(environment, "SLURM_GPUS_ON_NODE", 0)
    if device == "cuda" and not gpus:
        raise ConfigError("DEVICE: no GPU for 'cuda' (request some with sbatch --gpus-per-node)")
    ranks = _count(environment, "RANKS_PER_NODE", 0)
    return JobSettings(
        gpus=gpus,
        replicas=_count(environment, "TEACHER_REPLICAS", 1) or 1,
        ranks_per_node=ranks or None,
        log_dir=Path(environment.get("LOG_DIR") or "logs"),
    )


def _count(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(f"{name}: expected a number; got '{text}'")
    return int(text)


def _gpus_here() -> int:
    import torch  # noqa: PLC0415 - slow to import, and not needed under SLURM

    return torch.cuda.device_count()

"""The environment variables of the job scripts, and the flags that they stand for. Free of torch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvcore.errors import ConfigError

# Variables whose value is one flag's value. Unset or empty: the flag is left to its default.
VARIABLES: Mapping[str, str] = {
    "CONFIG": "config",
    "STUDENT": "student_model_name_or_path",
    "NUM_LATENTS": "num_latents",
    "USE_BF16": "bf16",
    "GRADIENT_CHECKPOINTING": "gradient_checkpointing",
    "NUM_TEACHERS": "num_teachers",
    "LOAD_IN_8BIT": "load_in_8bit",
    "LOAD_IN_4BIT": "load_in_4bit",
    "BNB_4BIT_COMPUTE_DTYPE": "bnb_4bit_compute_dtype",
    "TRAIN_SAMPLES": "train_samples",
    "VAL_SAMPLES": "val_samples",
    "USE_EXTENDED": "use_extended_datasets",
    "MATH23K_RATIO": "math23k_ratio",
    "DATA_DIR": "data_dir",
    "MAX_LENGTH": "max_length",
    "TRAIN_PHASE": "train_phase",
    "FUSION_STRATEGY": "fusion_strategy",
    "SIMILARITY_METRIC": "similarity_metric",
    "TEMPERATURE": "temperature",
    "ROUTER_TYPE": "router_type",
    "ROUTER_HIDDEN_DIM": "router_hidden_dim",
    "ENTROPY_REG_WEIGHT": "entropy_reg_weight",
    "KV_MODE": "kv_mode",
    "KV_STORE": "kv_store",
    "KV_COMPRESSION": "kv_compression",
    "KV_LOSS_TYPE": "kv_loss_type",
    "KV_LOSS_WEIGHT": "kv_loss_weight",
    "LAYER_MAP_STRATEGY": "layer_map_strategy",
    "HEAD_ADAPT_STRATEGY": "head_adapt_strategy",
    "LEARNING_RATE": "learning_rate",
    "WARMUP_RATIO": "warmup_ratio",
    "MAX_GRAD_NORM": "max_grad_norm",
    "BATCH_SIZE": "per_device_train_batch_size",
    "GRAD_ACCUM": "gradient_accumulation_steps",
    "NUM_EPOCHS": "num_train_epochs",
    "ZERO_STAGE": "zero_stage",
    "SEED": "seed",
    "OUTPUT_DIR": "output_dir",
    "EVAL_STEPS": "eval_steps",
    "SAVE_STEPS": "save_steps",
    "LOGGING_STEPS": "logging_steps",
}
# Variables that hold several values, separated by spaces.
LISTS: Mapping[str, str] = {
    "TEACHERS": "teacher_models",
    "TEACHER_MODELS": "teacher_models",
    "FIXED_WEIGHTS": "fixed_weights",
    "DATASET": "dataset_name",
}
# More flags, as they would stand on the command line.
EXTRA = "EXTRA_ARGS"


@dataclass(frozen=True, slots=True)
class JobSettings:
    """How a job uses its nodes.

    Attributes:
        gpus: of each node, 0 for CPUs.
        replicas: servers of each teacher.
        ranks_per_node: training processes, or None for one a GPU.
        log_dir: where each job's folder of logs goes.
    """

    gpus: int
    replicas: int
    ranks_per_node: int | None
    log_dir: Path


def recipe_flags(environment: Mapping[str, str]) -> list[str]:
    """The recipe's command line that the variables stand for.

    Raises:
        ConfigError: TEACHERS and TEACHER_MODELS name different teachers.
    """
    named = {environment[name] for name in ("TEACHERS", "TEACHER_MODELS") if environment.get(name)}
    if len(named) > 1:
        raise ConfigError("TEACHERS and TEACHER_MODELS mean the same, and differ: set one of them")
    flags: list[str] = []
    for name, flag in VARIABLES.items():
        if value := environment.get(name):
            flags += [f"--{flag}", value]
    for name, flag in LISTS.items():
        if values := environment.get(name, "").split():
            flags += [f"--{flag}", *values]
    return flags + shlex.split(environment.get(EXTRA, ""))


def job_settings(environment: Mapping[str, str], *, local: bool) -> JobSettings:
    """How the job uses its nodes: DEVICE, TEACHER_REPLICAS, RANKS_PER_NODE and LOG_DIR.

    Raises:
        ConfigError: a value is none that the variable takes.
    """
    device = environment.get("DEVICE") or "auto"
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"DEVICE: expected auto, cpu or cuda, got '{device}'")
    gpus = 0 if device == "cpu" else _gpus_here() if local else _count(environment, "SLURM_GPUS_ON_NODE", 0)
    if device == "cuda" and not gpus:
        raise ConfigError("DEVICE: cuda asked for, and there is no GPU (sbatch --gpus-per-node asks for some)")
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
        raise ConfigError(f"{name}: expected a number, got '{text}'")
    return int(text)


def _gpus_here() -> int:
    import torch  # noqa: PLC0415 - slow to import, and SLURM tells without it

    return torch.cuda.device_count()

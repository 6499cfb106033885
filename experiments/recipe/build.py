"""Turns the recipe's settings into the trainer's configuration. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.recipe.config import STAGES, FusionKind, RecipeSettings
from kvcore.config import parse
from student_trainer.config import TrainConfig
from student_trainer.launching.endpoints import teacher_names

# Maps that are trained together with a router start from these. Without a router these are used.
UNTRAINED = {"linear": "ridge", "learned": "ratio"}
# At the default temperature, similarity weights are almost equal, since the K/V of all teachers are similar.
SIMILARITY_TEMPERATURE = 0.2


@dataclass(frozen=True, slots=True)
class DataFiles:
    """The files with the records that the trainer reads."""

    train: Path
    val: Path

    @classmethod
    def under(cls, directory: Path) -> DataFiles:
        """The files in a directory."""
        return cls(directory / "train.jsonl", directory / "val.jsonl")


def train_config(
    settings: RecipeSettings, endpoints: Mapping[str, Sequence[str]], data: DataFiles, world_size: int
) -> TrainConfig:
    """Returns the configuration of the run, or of its three stages.

    Args:
        settings: the recipe's flags.
        endpoints: endpoints by teacher name; empty if K/V come from a store.
        data: training and validation records.
        world_size: number of ranks.

    Raises:
        FieldError: two settings are inconsistent; the field is named as in the trainer's configuration.
    """
    weights = settings.fixed_weights or (1.0,) * len(settings.teachers)
    names = teacher_names(settings.teachers)
    tree: dict[str, Any] = {
        "student": _student(settings),
        "teachers": [
            {"name": name, "endpoints": list(endpoints.get(name, ())), "weight": weight}
            for name, weight in zip(names, weights, strict=True)
        ],
        "kv": {"mode": settings.kv_mode, "store": settings.store, "selection": _selection(settings)},
        "align": _align(settings, settings.fusion),
        "fuse": _fuse(settings, settings.fusion),
        "loss": {"kv_weight": settings.kv_loss_weight, "kv_loss": settings.kv_loss_type},
        "data": {
            "train": data.train,
            "val": data.val,
            "max_tokens": settings.max_length,
            "answer_tokens": settings.answer_tokens,
        },
        "optim": {
            "lr": settings.learning_rate,
            "warmup_ratio": settings.warmup_ratio,
            "max_grad_norm": settings.max_grad_norm,
        },
        "run": _run(settings, world_size),
        "monitor": {"port": settings.monitor_port},
    }
    if settings.train_phase == "all":
        tree["stages"] = [
            {"name": name, "fuse": _fuse(settings, kind), "align": _align(settings, kind)} for name, kind in STAGES
        ]
    return parse(tree, TrainConfig)


def _student(settings: RecipeSettings) -> dict[str, Any]:
    return {
        "path": settings.student_model_name_or_path,
        "dtype": "bf16" if settings.bf16 else "fp32",
        "mode": settings.student_mode,
        "latents": settings.num_latents,
        "passes": settings.latent_passes,
        "gradient_checkpointing": settings.gradient_checkpointing,
    }


def _selection(settings: RecipeSettings) -> dict[str, Any]:
    full = settings.kv_compression == "full"
    return {
        "selector": settings.kv_compression,
        "budget": 0 if full else settings.num_latents,
        "span": "all" if full and settings.student_mode == "token" else "reasoning",
        # The alignment mixes heads and layers, so all of them need the same tokens.
        "scope": "sample",
    }


def _align(settings: RecipeSettings, kind: FusionKind) -> dict[str, Any]:
    chosen = {"layer_map": settings.layer_map_strategy, "head_adapter": settings.head_adapt_strategy}
    if kind != "learnable":
        chosen = {name: UNTRAINED.get(strategy, strategy) for name, strategy in chosen.items()}
    resampled = settings.kv_compression == "full" and settings.student_mode == "latent"
    return {
        **chosen,
        "time": "linear" if resampled else "none",
        "calibration_samples": settings.calibration_samples,
    }


def _fuse(settings: RecipeSettings, kind: FusionKind) -> dict[str, Any]:
    if kind == "fixed":
        return {"kind": kind}
    temperature = settings.temperature or (SIMILARITY_TEMPERATURE if kind == "similarity" else None)
    constant = {"temperature": temperature, "temperature_decay": 0.0}
    chosen = {"kind": kind, **(constant if temperature else {})}
    if kind == "similarity":
        return {**chosen, "metric": settings.similarity_metric}
    return {
        **chosen,
        "router": settings.router_type,
        "router_width": settings.router_hidden_dim,
        "entropy_weight": settings.entropy_reg_weight,
    }


def _run(settings: RecipeSettings, world_size: int) -> dict[str, Any]:
    micro_batch = settings.per_device_train_batch_size
    return {
        "output_dir": settings.output_dir,
        "seed": settings.seed,
        "steps": settings.max_steps,
        "epochs": None if settings.max_steps else settings.num_train_epochs,
        "global_batch": micro_batch * settings.gradient_accumulation_steps * world_size,
        "micro_batch": micro_batch,
        "zero_stage": settings.zero_stage,
        "allow_tf32": settings.allow_tf32,
        "log_every": settings.logging_steps,
        "eval_every": settings.eval_steps,
        "save_every": settings.save_steps,
        "best_by": settings.metric_for_best_model.removeprefix("eval_"),
    }

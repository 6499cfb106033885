"""Sizes and training configurations of the run on a real model. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.demo.demo_config import Config, DemoPaths
from student_trainer.config import BEST_MODEL

ArmName = Literal["ce", "kv", "shuffled"]
LatentArmName = Literal["latent_ce", "latent_kv"]

ARMS: tuple[ArmName, ...] = ("ce", "kv", "shuffled")
LATENT_ARMS: tuple[LatentArmName, ...] = ("latent_ce", "latent_kv")
TEACHER = "smollm2"
LATENTS = 8
# The first steps allocate memory and are left out of medians.
SKIPPED_STEPS = 2


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes of one run.

    Attributes:
        train: training records.
        val: held-out records.
        max_tokens: longest record; two CPU cores need a second for about 300 tokens.
        steps: steps of each arm in token mode.
        latent_steps: steps of each arm in latent mode.
        replay_steps: steps that are recorded and replayed.
        batch: records per step.
        calibration: records on which alignments are fitted.
        lr: peak learning rate, chosen on the arm `ce` of seed 0.
        extracted: records whose K/V are extracted.
        questions: benchmark questions that the best model answers.
        answer_tokens: longest answer to one of them.
    """

    train: int = 1000
    val: int = 64
    max_tokens: int = 160
    steps: int = 30
    latent_steps: int = 10
    replay_steps: int = 6
    batch: int = 4
    calibration: int = 48
    lr: float = 1e-3
    extracted: int = 16
    questions: int = 8
    answer_tokens: int = 96


FULL = Settings()
QUICK = Settings(
    train=100,
    val=8,
    max_tokens=96,
    steps=4,
    latent_steps=2,
    replay_steps=2,
    calibration=16,
    extracted=4,
    questions=2,
    answer_tokens=16,
)


@dataclass(frozen=True, slots=True)
class RealPaths:
    """The folders of one output directory.

    `models` are shared by quick and full runs, which have folders of their own.
    """

    output: Path
    quick: bool

    @property
    def teacher(self) -> Path:
        """The teacher's directory."""
        return self.output / "models" / "teacher"

    @property
    def student(self) -> Path:
        """The untrained student's directory."""
        return self.output / "models" / "student"

    @property
    def runs(self) -> DemoPaths:
        """Data, runs and logs."""
        return DemoPaths(self.output / ("quick" if self.quick else "full"))


def arm_config(arm: ArmName, seed: int, settings: Settings, paths: RealPaths, port: int) -> Config:
    """One arm in token mode. Arms differ only in the teacher and the control."""
    config = base_config(f"{arm}-seed{seed}", seed, settings, paths)
    config["student"] = {"path": str(paths.student), "mode": "token"}
    config["run"]["steps"] = settings.steps
    if arm != "ce":
        config |= teacher_sections(settings, {"selector": "full", "span": "all"}, port)
    if arm == "shuffled":
        config["kv"]["control"] = "shuffled"
    return config


def latent_config(arm: LatentArmName, seed: int, settings: Settings, paths: RealPaths, port: int) -> Config:
    """A short run in latent mode, from the student that the arm `ce` of the same seed trained on the text."""
    config = base_config(arm, seed, settings, paths)
    start = paths.runs.run(f"ce-seed{seed}") / BEST_MODEL
    config["student"] = {"path": str(start), "mode": "latent", "latents": LATENTS, "passes": 3}
    config["run"]["steps"] = settings.latent_steps
    if arm == "latent_kv":
        selection = {"selector": "right", "budget": LATENTS, "span": "reasoning"}
        config |= teacher_sections(settings, selection, port)
    return config


def replay_config(
    mode: Literal["record", "offline"], seed: int, settings: Settings, paths: RealPaths, port: int
) -> Config:
    """A few steps of the arm `kv` that record or replay the teacher's K/V. The replay gets no endpoint."""
    config = arm_config("kv", seed, settings, paths, port)
    config["run"] |= {"output_dir": str(paths.runs.run(mode)), "steps": settings.replay_steps}
    config["kv"] |= {"mode": mode, "store": str(paths.runs.run("store"))}
    if mode == "offline":
        config["teachers"][0]["endpoints"] = []
    return config


def base_config(name: str, seed: int, settings: Settings, paths: RealPaths) -> Config:
    """What all runs share: data, optimiser and length of a run without a teacher."""
    return {
        "data": {
            "train": str(paths.runs.split("train")),
            "val": str(paths.runs.split("val")),
            "max_tokens": settings.max_tokens,
            # Validation here is about losses. `kvdistill eval` scores answers.
            "answer_tokens": 1,
        },
        "optim": {"lr": settings.lr, "warmup_ratio": 0.1, "schedule": "cosine"},
        "run": {
            "output_dir": str(paths.runs.run(name)),
            "seed": seed,
            "global_batch": settings.batch,
            "micro_batch": settings.batch,
            "zero_stage": 0,
            "log_every": 1,
            "best_by": "ce_loss",
        },
    }


def teacher_sections(settings: Settings, selection: dict[str, Any], port: int) -> Config:
    """The sections of a run that learns from the teacher's K/V of the selected tokens."""
    return {
        "teachers": [{"name": TEACHER, "endpoints": [f"127.0.0.1:{port}"]}],
        "kv": {"selection": selection},
        "align": {
            "direction": "to_teacher",
            "layer_map": "uniform",
            "calibration_samples": settings.calibration,
        },
        "loss": {"kv_weight": "auto"},
    }

"""Training runs for tests: tiny models and data, real teacher servers, real torchrun launches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.records import write_records
from data.synthetic import ChainTask, make_splits
from tests.support.servers import REPOSITORY
from tests.support.tiny_models import save_tiny_model, tiny_spec

LATENTS = 3
Endpoints = dict[str, list[str]]
LOSSES = ("train/loss", "train/ce_loss", "train/kv_loss")
# Sums in another order, as other ZeRO stages have them, change fp32 losses of up to 22 by a relative error of 2e-6.
OTHER_ORDER = 4e-5


@dataclass(frozen=True)
class World:
    """A student, two teachers of other families, and data, on disk."""

    directory: Path
    student: Path
    teachers: dict[str, Path]
    train: Path
    val: Path

    def config(self, name: str, endpoints: Mapping[str, Sequence[str]], **changes: Any) -> dict[str, Any]:
        """A short latent run; `changes` are sections, merged one level deep."""
        config: dict[str, Any] = {
            "student": {"path": str(self.student), "mode": "latent", "latents": LATENTS, "passes": 2},
            "teachers": [{"name": teacher, "endpoints": list(found)} for teacher, found in endpoints.items()],
            "kv": {"selection": {"selector": "r_kv", "budget": LATENTS}, "patience_s": 3.0, "prefetch": 2},
            "align": {"calibration_samples": 48},
            "loss": {"kv_weight": 5.0},
            "data": {"train": str(self.train), "val": str(self.val), "answer_tokens": 2},
            "optim": {"lr": 0.003, "schedule": "linear"},
            "run": {
                "output_dir": str(self.directory / name),
                "steps": 6,
                "global_batch": 8,
                "micro_batch": 2,
                "log_every": 1,
            },
        }
        for section, values in changes.items():
            config[section] = {**config[section], **values} if isinstance(values, dict) else values
        return config


def make_world(directory: Path) -> World:
    """Tiny random models and chain-arithmetic data."""
    splits = make_splits(ChainTask(), 96, 10, 1, seed=0)
    train, val = directory / "train.jsonl", directory / "val.jsonl"
    write_records(train, splits.train)
    write_records(val, splits.val)
    student = save_tiny_model(directory / "student", tiny_spec("qwen3", layers=2, kv_heads=1, seed=3))
    teachers = {
        "ada": save_tiny_model(directory / "ada", tiny_spec("qwen2", seed=1)),
        "ben": save_tiny_model(directory / "ben", tiny_spec("llama", layers=4, kv_heads=4, head_dim=8, seed=2)),
    }
    return World(directory, student, teachers, train, val)


def start_training(command: list[str], ranks: int, log: Path) -> subprocess.Popen[bytes]:
    """Start `python -m ...` under torchrun with its output in `log`."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    with log.open("wb") as out:
        return subprocess.Popen(
            [*launch, "-m", *command],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=out,
        )


def train(configs: Sequence[dict[str, Any]], ranks: int, directory: Path) -> list[Path]:
    """Run configurations one after the other in one launch, and return their output directories."""
    plan = directory / "plan.json"
    plan.write_text(json.dumps([{"name": str(i), "config": c, "test": None} for i, c in enumerate(configs)]))
    log = directory / "train.log"
    process = start_training(["experiments.demo.arms", str(plan)], ranks, log)
    try:
        assert process.wait(600) == 0, log.read_text(encoding="utf-8")[-6000:]
    finally:
        process.kill()
    return [Path(config["run"]["output_dir"]) for config in configs]


def copy_checkpoint(run: Path, step: int, output: Path) -> None:
    """Copy a run's checkpoint and metrics, so that a run with this output directory resumes from the step."""
    shutil.copytree(run / f"checkpoints/step-{step:08d}", output / f"checkpoints/step-{step:08d}")
    shutil.copy(run / "metrics.jsonl", output / "metrics.jsonl")


def start_cli(config: dict[str, Any], ranks: int, directory: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """Start `kvdistill train` under torchrun, and return the process and its log."""
    path, log = directory / "run.yaml", directory / "run.log"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return start_training(["kvdistill", "train", "--config", str(path)], ranks, log), log


def metrics(output: Path, name: str) -> dict[int, float]:
    """The values of one metric, by step."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def assert_same_losses(one: Path, other: Path, tolerance: float, names: Sequence[str] = LOSSES) -> None:
    """Compare every logged step of two runs."""
    for name in names:
        ours, theirs = metrics(one, name), metrics(other, name)
        assert ours.keys() == theirs.keys()
        assert ours, name
        for step, value in ours.items():
            assert value == pytest.approx(theirs[step], abs=tolerance), (name, step)

"""What the runs left on disk, gathered into the figures that the report shows."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.demo.demo_config import (
    ARMS,
    CONTROLS,
    LEAST_KV_ACCURACY,
    MOST_CONTROL_ACCURACY,
    ArmName,
    DemoPaths,
)
from kvcore.errors import KVDistillError

# Online and offline read the same encoded K/V in the same order; only rounding in reductions may differ.
SAME_LOSS = 1e-6
STAGES = ("queue", "prefill", "encode", "network", "decode", "stall")
TRAINER_STAGES = frozenset({"decode", "stall"})
Metrics = list[dict[str, float]]


class ResultError(KVDistillError):
    """A run did not leave what it should have."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Figures over steps, of one seed."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm: a figure per seed, and its first seed's curves. KV losses are None where no teacher was asked."""

    accuracy: list[float]
    kv_loss: list[float | None]
    accuracy_curve: Curve
    kv_loss_curve: Curve


@dataclass(frozen=True, slots=True)
class Replay:
    """The recorded epoch against its replay from the store."""

    steps: int
    largest_difference: float
    same_steps: bool

    @property
    def matches(self) -> bool:
        """Whether every step's losses are the same."""
        return self.same_steps and self.steps > 0 and self.largest_difference <= SAME_LOSS


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that the report says. Throughput, bytes and stall are those of the two-teacher arm, first seed."""

    arms: dict[ArmName, Arm]
    chance: float
    bytes_per_sample: float
    raw_bf16_bytes_per_sample: float
    stall_fraction: float
    samples_per_second: float
    teacher_tokens_per_second: float
    peak_memory_mb: dict[str, float]
    replay: Replay
    seconds: dict[str, float]
    stages_ms: dict[str, float] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "arms": {name: {"accuracy": arm.accuracy, "kv_loss": arm.kv_loss} for name, arm in self.arms.items()},
            "chance": self.chance,
            "bytes_per_sample": self.bytes_per_sample,
            "raw_bf16_bytes_per_sample": self.raw_bf16_bytes_per_sample,
            "stall_fraction": self.stall_fraction,
            "samples_per_second": self.samples_per_second,
            "teacher_tokens_per_second": self.teacher_tokens_per_second,
            "peak_memory_mb": self.peak_memory_mb,
            "offline_matches_online": self.replay.matches,
            "seconds": self.seconds,
        }

    def misses(self) -> list[str]:
        """What came out otherwise than expected, a sentence each; empty when all is as it should be."""
        found: list[str] = []
        for name, arm in self.arms.items():
            for seed, accuracy in enumerate(arm.accuracy):
                if name in CONTROLS and accuracy > MOST_CONTROL_ACCURACY:
                    limit = f"over {MOST_CONTROL_ACCURACY:.0%}"
                elif name not in CONTROLS and accuracy < LEAST_KV_ACCURACY:
                    limit = f"under {LEAST_KV_ACCURACY:.0%}"
                else:
                    continue
                found.append(f"{name}, seed {seed}: {accuracy:.1%} of the test items, {limit}.")
        if not self.replay.matches:
            found.append(
                f"The run from the store does not repeat the recorded one: losses differ by up to "
                f"{self.replay.largest_difference:.2e} over {self.replay.steps} steps."
            )
        return found


def gather_arm(name: ArmName, seeds: int, layout: DemoPaths) -> Arm:
    """Reads one arm's runs.

    Raises:
        ResultError: a file or a figure is missing.
    """
    runs = [layout.run(f"{name}-seed{seed}") for seed in range(seeds)]
    metrics = read_metrics(runs[0])
    kv_losses = [_json(run / "summary.json")["val_kv_loss"] for run in runs]
    return Arm(
        [float(_json(run / "result.json")["test_accuracy"]) for run in runs],
        [None if value is None else float(value) for value in kv_losses],
        curve(metrics, "val/task_metrics/accuracy"),
        curve(metrics, "train/kv_loss"),
    )


def gather_arms(seeds: int, layout: DemoPaths) -> dict[ArmName, Arm]:
    """Reads every arm."""
    return {name: gather_arm(name, seeds, layout) for name in ARMS}


def gather_replay(layout: DemoPaths) -> Replay:
    """Compares the losses of the recorded and the replayed epoch, step by step."""
    online, offline = (_losses(read_metrics(layout.run(mode))) for mode in ("record", "offline"))
    shared = sorted(online.keys() & offline.keys())
    differences = [abs(a - b) for step in shared for a, b in zip(online[step], offline[step], strict=True)]
    # max() alone would let a NaN pass or not by its place in the list.
    largest = math.nan if any(map(math.isnan, differences)) else max(differences, default=math.inf)
    return Replay(len(shared), largest, online.keys() == offline.keys())


def stages_ms(metrics: Metrics, samples: int, teachers: int) -> dict[str, float]:
    """Milliseconds of each stage for one request, on average over the log; {} where none was logged.

    Args:
        metrics: of a run with teachers.
        samples: how many one request holds: each of them logs the whole request's time at the teacher.
        teachers: how many are asked: what is logged is their sum.
    """
    found: dict[str, float] = {}
    for stage in STAGES:
        values = [line[f"kv/{stage}_s"] for line in metrics if f"kv/{stage}_s" in line]
        if values:
            share = teachers if stage in TRAINER_STAGES else teachers * samples
            found[stage] = 1000 * sum(values) / len(values) / share
    return found


def summary(run: Path) -> dict[str, Any]:
    """A run's summary.json."""
    return _json(run / "summary.json")


def seconds(run: Path) -> float:
    """How long a run took, start to end."""
    return float(_json(run / "result.json")["seconds"])


def read_metrics(run: Path) -> Metrics:
    """A run's metrics.jsonl.

    Raises:
        ResultError: there is none.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ResultError(f"{path} is missing: the run ended early")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def curve(metrics: Metrics, name: str) -> Curve:
    """One metric over steps."""
    points = [(int(line["step"]), float(line[name])) for line in metrics if name in line]
    return Curve([step for step, _ in points], [value for _, value in points])


def _losses(metrics: Metrics) -> dict[int, tuple[float, float]]:
    return {int(line["step"]): (line["train/loss"], line["train/kv_loss"]) for line in metrics if "train/loss" in line}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ResultError(f"{path} is missing: the run ended early")
    return json.loads(path.read_text(encoding="utf-8"))

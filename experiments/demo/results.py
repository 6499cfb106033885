"""The demo's results, read from its runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.demo.demo_config import ARMS, CONTROLS, LEAST_KV_ACCURACY, MOST_CONTROL_ACCURACY, ArmName, DemoPaths
from experiments.demo.questions import Inference
from kvcore.errors import KVDistillError
from kvdistill.report.finished_runs import Points, Run, read_run

# Online and offline read the same encoded K/V in the same order; only rounding in reductions may differ.
SAME_LOSS = 1e-6
STAGES = ("queue", "prefill", "encode", "network", "decode", "stall")


class ResultError(KVDistillError):
    """A run did not write one of its files."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm: values per seed, and the curves of the first seed. KV losses are None for an arm without teachers."""

    accuracy: list[float]
    kv_loss: list[float | None]
    accuracy_curve: Points
    kv_loss_curve: Points

    @property
    def mean_accuracy(self) -> float:
        """The mean over seeds."""
        return sum(self.accuracy) / len(self.accuracy)


@dataclass(frozen=True, slots=True)
class Replay:
    """The losses of the recorded epoch compared with those of its replay from the store."""

    steps: int
    largest_difference: float
    same_steps: bool

    @property
    def matches(self) -> bool:
        """Whether every step's losses are the same."""
        return self.same_steps and self.steps > 0 and self.largest_difference <= SAME_LOSS


@dataclass(frozen=True, slots=True)
class Results:
    """The values of the report. Throughput, bytes and stall are those of the two-teacher arm's first seed."""

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
    inference: Inference
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
            "inference": self.inference.as_json(),
            "seconds": self.seconds,
        }

    def misses(self) -> list[str]:
        """One sentence per result that is not as expected."""
        found: list[str] = []
        for name, arm in self.arms.items():
            for seed, accuracy in enumerate(arm.accuracy):
                problem = f"{name}, seed {seed}: {accuracy:.1%} of the test items, "
                if name in CONTROLS and accuracy > MOST_CONTROL_ACCURACY:
                    found.append(f"{problem}over {MOST_CONTROL_ACCURACY:.0%}.")
                elif name not in CONTROLS and accuracy < LEAST_KV_ACCURACY:
                    found.append(f"{problem}under {LEAST_KV_ACCURACY:.0%}.")
        if not self.replay.matches:
            found.append(
                f"The run from the store does not repeat the recorded one: losses differ by up to "
                f"{self.replay.largest_difference:.2e} over {self.replay.steps} steps."
            )
        return found


def gather_arms(seeds: int, paths: DemoPaths) -> dict[ArmName, Arm]:
    """Reads every arm. Raises a ResultError if a file is missing."""
    return {name: gather_arm([paths.run(f"{name}-seed{seed}") for seed in range(seeds)]) for name in ARMS}


def gather_arm(directories: Sequence[Path]) -> Arm:
    """Reads the runs of one arm, one per seed. Raises a ResultError if a file is missing."""
    runs = [finished(directory) for directory in directories]
    return Arm(
        [float(result(directory)["test_accuracy"]) for directory in directories],
        [summary(run)["val_kv_loss"] for run in runs],
        runs[0].series("val/task_metrics/accuracy"),
        runs[0].series("train/kv_loss"),
    )


def gather_replay(paths: DemoPaths) -> Replay:
    """Compares the losses of the recorded and the replayed epoch, step by step."""
    online, offline = (_losses(finished(paths.run(mode))) for mode in ("record", "offline"))
    shared = sorted(online.keys() & offline.keys())
    differences = [abs(a - b) for step in shared for a, b in zip(online[step], offline[step], strict=True)]
    # max() alone would return or drop a NaN depending on its place in the list.
    largest = math.nan if any(map(math.isnan, differences)) else max(differences, default=math.inf)
    return Replay(len(shared), largest, online.keys() == offline.keys())


def stages_ms(run: Run, teachers: int) -> dict[str, float]:
    """The mean milliseconds per micro-batch and teacher of each stage that the run logged.

    Args:
        run: with teachers.
        teachers: number of teachers; the log has their sum.
    """
    found: dict[str, float] = {}
    for stage in STAGES:
        values = [value for _, value in run.series(f"kv/{stage}_s")]
        if values:
            found[stage] = 1000 * sum(values) / len(values) / teachers
    return found


def finished(directory: Path) -> Run:
    """Reads a run that has ended.

    Raises:
        ResultError: it has no summary.json.
    """
    run = read_run(directory, directory.name)
    if run.summary is None:
        raise ResultError(f"{directory / 'summary.json'} is missing: the run ended early")
    return run


def summary(run: Run) -> Mapping[str, Any]:
    """The summary.json of a finished run."""
    assert run.summary is not None
    return run.summary


def result(directory: Path) -> dict[str, Any]:
    """The result.json that `experiments.demo.arms` writes.

    Raises:
        ResultError: it is missing.
    """
    path = directory / "result.json"
    if not path.is_file():
        raise ResultError(f"{path} is missing: the run ended early")
    return json.loads(path.read_text(encoding="utf-8"))


def _losses(run: Run) -> dict[int, tuple[float, float]]:
    return {
        int(line["step"]): (line["train/loss"], line["train/kv_loss"]) for line in run.metrics if "train/loss" in line
    }

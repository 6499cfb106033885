"""Comparisons: several arms on the demo's task, from the same student, over several seeds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.demo.demo_config import FULL, QUICK, TEACHERS, Config, Settings, run_config
from experiments.demo.results import finished, result
from experiments.demo.run_demo import Demo
from kvcore.files import json_text

ACCURACY = "val/task_metrics/accuracy"
WEIGHT = "routing/weights_mean/"


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm of a comparison.

    Attributes:
        name: of the arm.
        teachers: names of its teachers.
        changes: sections of the configuration, merged one level deep.
        start: the arm whose best model of the same seed it starts from; the demo's first student if empty.
        self_teacher: whether the student is its own teacher, which needs no alignment.
    """

    name: str
    teachers: tuple[str, ...] = TEACHERS
    changes: Config = field(default_factory=dict)
    start: str = ""
    self_teacher: bool = False


NO_KV = Arm("no KV", ())


class Comparison(Demo):
    """The demo's models, servers and data with other arms.

    Args:
        arms: in the order in which they run.
        output: the folder for runs and models.
        settings: sizes, steps and learning rate.
        seeds: of the runs of each arm.
    """

    def __init__(self, arms: Sequence[Arm], output: Path, settings: Settings, seeds: Sequence[int]) -> None:
        super().__init__(output, settings, len(seeds))
        self.arms, self.each_seed = tuple(arms), tuple(seeds)

    def run_of(self, arm: str, seed: int) -> Path:
        """The output directory of one run."""
        return self.paths.run(f"{arm.replace(' ', '_')}-seed{seed}")

    def plan(self, student: Path, ports: dict[str, int]) -> list[dict[str, Any]]:
        """The runs of one launch: every arm with every seed."""
        return [self._planned(arm, seed, student, ports) for arm in self.arms for seed in self.each_seed]

    def _planned(self, arm: Arm, seed: int, student: Path, ports: dict[str, int]) -> dict[str, Any]:
        chosen = {name: ports[name] for name in arm.teachers}
        start = self.run_of(arm.start, seed) / "best_model" if arm.start else student
        output = self.run_of(arm.name, seed)
        config = run_config(output.name, seed, self.settings, self.paths, start, chosen)
        if arm.self_teacher:
            config |= {"self_teacher": True, "align": {}}
        for section, values in arm.changes.items():
            config[section] = {**config.get(section, {}), **values}
        return {"name": f"{arm.name} seed {seed}", "config": config, "test": str(self.paths.split("test"))}

    def compare(self) -> dict[str, dict[str, Any]]:
        """Returns per arm: test accuracy by seed, validation accuracy by seed and step, last mean weights by seed."""
        self.train_arms()
        return {arm.name: self._measured(arm) for arm in self.arms}

    def _measured(self, arm: Arm) -> dict[str, Any]:
        runs = [self.run_of(arm.name, seed) for seed in self.each_seed]
        metrics = [finished(run).metrics for run in runs]
        measured: dict[str, Any] = {
            "test_accuracy": [result(run)["test_accuracy"] for run in runs],
            "val_accuracy_by_step": [
                {line["step"]: line[ACCURACY] for line in run if ACCURACY in line} for run in metrics
            ],
        }
        if len(arm.teachers) > 1:
            lines = [next(line for line in reversed(run) if f"{WEIGHT}{arm.teachers[0]}" in line) for run in metrics]
            measured["mean_weight"] = {
                name: [round(line[f"{WEIGHT}{name}"], 4) for line in lines] for name in arm.teachers
            }
        return measured


def run(description: str | None, output: str, make: Callable[[Path, Settings, Sequence[int]], Comparison]) -> None:
    """The command line of a comparison: prints one JSON object as its last line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(output), help=f"folder of the runs; {output} by default")
    parser.add_argument("--seeds", type=int, default=3, help="runs per arm; 3 by default")
    parser.add_argument("--quick", action="store_true", help="the steps of kvdistill demo --quick")
    arguments = parser.parse_args()
    comparison = make(arguments.output, QUICK if arguments.quick else FULL, range(arguments.seeds))
    sys.stdout.write(json_text(comparison.compare()) + "\n")

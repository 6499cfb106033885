"""Several ways of training on the demo's task, from the same warm student, over seeds: what every comparison shares."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.demo.demo_config import FULL, QUICK, TEACHERS, Config, Settings, run_config
from experiments.demo.results import read_metrics
from experiments.demo.run_demo import Demo
from kvcore.files import json_text

ACCURACY = "val/task_metrics/accuracy"
WEIGHT = "routing/weights_mean/"


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of training.

    `changes`: sections of the configuration, merged one level deep. `start`: the way whose best model of the same seed
    it starts from, the warm student if empty.
    """

    name: str
    teachers: tuple[str, ...] = TEACHERS
    changes: Config = field(default_factory=dict)
    start: str = ""


NO_KV = Arm("no KV", ())
SHUFFLED_KV = Arm("shuffled KV", changes={"kv": {"control": "shuffled"}})


class Comparison(Demo):
    """The demo's models, servers and data with other arms.

    Args:
        ways: in the order in which they run.
        output: where runs and models go.
        settings: sizes, steps and rate.
        seeds: runs of each way.
    """

    def __init__(self, ways: Sequence[Arm], output: Path, settings: Settings, seeds: int) -> None:
        super().__init__(output, settings, seeds)
        self.ways = tuple(ways)

    def run_of(self, way: str, seed: int) -> Path:
        """The output directory of one run."""
        return self.layout.run(f"{way.replace(' ', '_')}-seed{seed}")

    def plan(self, student: Path, ports: dict[str, int]) -> list[dict[str, Any]]:
        """Every way for every seed."""
        return [self._planned(way, seed, student, ports) for way in self.ways for seed in range(self.seeds)]

    def _planned(self, way: Arm, seed: int, student: Path, ports: dict[str, int]) -> dict[str, Any]:
        chosen = {name: ports[name] for name in way.teachers}
        start = self.run_of(way.start, seed) / "best_model" if way.start else student
        output = self.run_of(way.name, seed)
        config = run_config(output.name, seed, self.settings, self.layout, start, chosen)
        for section, values in way.changes.items():
            config[section] = {**config.get(section, {}), **values}
        return {"name": f"{way.name} seed {seed}", "config": config, "test": str(self.layout.split("test"))}

    def compare(self) -> dict[str, dict[str, Any]]:
        """Per way: test accuracy by seed, validation accuracy by seed and step, and the last mean weight by seed."""
        self.train_arms()
        return {way.name: self._found(way) for way in self.ways}

    def _found(self, way: Arm) -> dict[str, Any]:
        runs = [self.run_of(way.name, seed) for seed in range(self.seeds)]
        metrics = [read_metrics(run) for run in runs]
        found: dict[str, Any] = {
            "test_accuracy": [json.loads((run / "result.json").read_text("utf-8"))["test_accuracy"] for run in runs],
            "val_accuracy_by_step": [
                {line["step"]: line[ACCURACY] for line in run if ACCURACY in line} for run in metrics
            ],
        }
        if len(way.teachers) > 1:
            lines = [next(line for line in reversed(run) if f"{WEIGHT}{way.teachers[0]}" in line) for run in metrics]
            found["mean_weight"] = {
                name: [round(line[f"{WEIGHT}{name}"], 4) for line in lines] for name in way.teachers
            }
        return found


def run(description: str | None, output: str, make: Callable[[Path, Settings, int], Comparison]) -> None:
    """The command line of a comparison: prints one JSON object as its last line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(output), help=f"folder of the runs; {output} by default")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way; 3 by default")
    parser.add_argument("--quick", action="store_true", help="the steps of kvdistill demo --quick")
    arguments = parser.parse_args()
    comparison = make(arguments.output, QUICK if arguments.quick else FULL, arguments.seeds)
    sys.stdout.write(json_text(comparison.compare()) + "\n")

"""Both directions of alignment on the demo's task: `python -m experiments.demo.compare_directions`.

Everything is as in `kvdistill demo`, but for the arms: two teachers and one, each with `align.direction` to_student and
to_teacher. Prints one JSON object as its last line; docs/alignment.md holds the figures of such a run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from experiments.demo.results import read_metrics
from experiments.demo.run import Demo
from experiments.demo.settings import FULL, QUICK, ArmName, arm_config

ARMS: tuple[ArmName, ...] = ("kv_two_teachers", "kv_one_teacher")
DIRECTIONS = ("to_student", "to_teacher")


class Directions(Demo):
    """The demo with other arms."""

    def _plan(self, student: Path, ports: dict[str, int]) -> list[dict[str, Any]]:
        plan: list[dict[str, Any]] = []
        for arm in ARMS:
            for direction in DIRECTIONS:
                for seed in range(self.seeds):
                    config = arm_config(arm, seed, self.settings, self.layout, student, ports)
                    config["align"] = {"direction": direction}
                    config["run"]["output_dir"] = str(self.layout.run(f"{arm}-{direction}-seed{seed}"))
                    name = f"{arm} {direction} seed {seed}"
                    plan.append({"name": name, "config": config, "test": str(self.layout.split("test"))})
        return plan

    def compare(self) -> dict[str, dict[str, list[Any]]]:
        """Test accuracy and the validation accuracy at each evaluation, by arm and seed."""
        self.train_arms()
        found: dict[str, dict[str, list[Any]]] = {}
        for arm in ARMS:
            for direction in DIRECTIONS:
                runs = [self.layout.run(f"{arm}-{direction}-seed{seed}") for seed in range(self.seeds)]
                name = "val/task_metrics/accuracy"
                curves = [{line["step"]: line[name] for line in read_metrics(run) if name in line} for run in runs]
                tests = [json.loads((run / "result.json").read_text(encoding="utf-8"))["test_accuracy"] for run in runs]
                found[f"{arm} {direction}"] = {"test_accuracy": tests, "val_accuracy_by_step": curves}
        return found


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/directions"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the steps of kvdistill demo --quick")
    arguments = parser.parse_args()
    found = Directions(arguments.output, QUICK if arguments.quick else FULL, arguments.seeds).compare()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

"""Two ways to pair the tokens of two tokenizers.

How many of the student's tokens find a counterpart, and how much of the student's own K/V a ridge map from the
teacher's explains at them on held-out samples; beside it the same with each teacher row facing another sample's.
Nothing is trained: an alignment is all that is measured, over whole texts, for other samples with each seed.
docs/results.md has the figures.

Examples:
  python -m experiments.comparisons.token_pairs
  python -m experiments.comparisons.token_pairs --quick --seeds 1 --output outputs/token_pairs
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.comparisons.base import Arm, Comparison, run
from experiments.demo import results
from experiments.demo.demo_config import TEACHERS, Config, Settings

METHODS = ("boundary", "overlap")
# The shortest run that there is; it leaves its alignments in its summary.
ALIGN_ONLY: Config = {
    "student": {"mode": "token"},
    "kv": {"selection": {"selector": "full", "span": "all"}},
    "run": {"steps": 1, "eval_every": 0},
}
MEASURED = ("coverage", "explained_variance", "explained_variance_shuffled")


class TokenPairs(Comparison):
    """A comparison of alignments instead of trainings."""

    def plan(self, student: Path, ports: dict[str, int]) -> list[dict[str, Any]]:
        """As ever, but without test items."""
        return [planned | {"test": None} for planned in super().plan(student, ports)]

    def compare(self) -> dict[str, dict[str, Any]]:
        """Per way and teacher, by seed: coverage, explained variance, and that of the shuffled control."""
        self.train_arms()
        return {way.name: {name: self._alignments(way, name) for name in way.teachers} for way in self.ways}

    def _alignments(self, way: Arm, teacher: str) -> dict[str, list[Any]]:
        runs = [self.run_of(way.name, seed) for seed in range(self.seeds)]
        reports = [results.summary(run)["alignment"][teacher] for run in runs]
        return {name: [report[name] for report in reports] for name in MEASURED}


def make(output: Path, settings: Settings, seeds: int) -> Comparison:
    """The comparison."""
    ways = [Arm(method, TEACHERS, ALIGN_ONLY | {"align": {"tokens": method}}) for method in METHODS]
    return TokenPairs(ways, output, settings, seeds)


if __name__ == "__main__":
    run(__doc__, "outputs/token_pairs", make)

"""Compares two methods of pairing the tokens of two tokenizers.

It measures how many of the student's tokens have a counterpart, and how much of the student's own K/V at these tokens a
ridge map from the teacher's K/V explains on held-out samples. The control pairs each teacher row with another sample.
Nothing is trained: only the alignment is measured, over whole texts, on other samples for each seed.
docs/results.md has the results.

Examples:
  python -m experiments.comparisons.token_pairs
  python -m experiments.comparisons.token_pairs --quick --seeds 1 --output outputs/token_pairs
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.comparisons.base import Arm, Comparison, run
from experiments.demo import results
from experiments.demo.demo_config import TEACHERS, Config, Settings

METHODS = ("boundary", "overlap")
# The shortest possible run; its summary has the alignments.
ALIGN_ONLY: Config = {
    "student": {"mode": "token"},
    "kv": {"selection": {"selector": "full", "span": "all"}},
    "run": {"steps": 1, "eval_every": 0},
}
MEASURED = ("coverage", "explained_variance", "explained_variance_shuffled")


class TokenPairs(Comparison):
    """A comparison of alignments instead of training runs."""

    def plan(self, student: Path, ports: dict[str, int]) -> list[dict[str, Any]]:
        """The runs of one launch, without test items."""
        return [planned | {"test": None} for planned in super().plan(student, ports)]

    def compare(self) -> dict[str, dict[str, Any]]:
        """Returns per arm, teacher and seed: coverage, explained variance, and that of the shuffled control."""
        self.train_arms()
        return {arm.name: {name: self._alignments(arm, name) for name in arm.teachers} for arm in self.arms}

    def _alignments(self, arm: Arm, teacher: str) -> dict[str, list[Any]]:
        runs = [self.run_of(arm.name, seed) for seed in self.each_seed]
        reports = [results.summary(results.finished(run))["alignment"][teacher] for run in runs]
        return {name: [report[name] for report in reports] for name in MEASURED}


def make(output: Path, settings: Settings, seeds: Sequence[int]) -> Comparison:
    """The comparison."""
    arms = [Arm(method, TEACHERS, ALIGN_ONLY | {"align": {"tokens": method}}) for method in METHODS]
    return TokenPairs(arms, output, settings, seeds)


if __name__ == "__main__":
    run(__doc__, "outputs/token_pairs", make)

"""Compares both directions of alignment.

Two teachers and one teacher, each with `align.direction` to_student and to_teacher. docs/results.md has the results.

Examples:
  python -m experiments.comparisons.directions
  python -m experiments.comparisons.directions --quick --seeds 1 --output outputs/directions
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.comparisons.base import Arm, Comparison, run
from experiments.demo.demo_config import TEACHERS, Settings

ARMS = tuple(
    Arm(f"{count} {direction}", teachers, {"align": {"direction": direction}})
    for count, teachers in (("two teachers", TEACHERS), ("one teacher", TEACHERS[:1]))
    for direction in ("to_student", "to_teacher")
)


def make(output: Path, settings: Settings, seeds: Sequence[int]) -> Comparison:
    """The comparison."""
    return Comparison(ARMS, output, settings, seeds)


if __name__ == "__main__":
    run(__doc__, "outputs/directions", make)

"""Compares all selectors when they drop half of the tokens.

The reasoning has three running values among three fillers, at random positions per question. The teacher sends three of
these six tokens: which selector keeps those that the student needs? As in KaVa (arXiv 2510.02312) the teacher is the
first student itself, reading the reasoning text. So every layer and head may keep its own tokens, and nothing is
aligned.

Examples:
  python -m experiments.comparisons.selectors
  python -m experiments.comparisons.selectors --quick --seeds 1 --output outputs/selectors
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.comparisons.base import NO_KV, Arm, Comparison, run
from experiments.demo.demo_config import LATENTS, Config, ModelName, Settings
from experiments.demo.pretrain import Pretrained

TEACHER = "itself"
FILLERS = 3
STEPS, RATE = 600, 4e-3
PRETRAIN_RATE = 3e-3
PRETRAIN_STEPS: dict[ModelName, int] = {"teacher_a": 1, "teacher_b": 1, "student": 1500}
SAME_MODEL: Config = {"head_adapter": "identity"}
# Those that keep a part of the reasoning.
SELECTORS = ("right", "r_kv", "uniform", "random", "keydiff")


def _arm(selector: str) -> Arm:
    # Redundancy tells the fillers from the values, so it has the weight that KaVa gives it.
    selection = {
        "selector": selector,
        "budget": LATENTS,
        "span": "reasoning",
        "scope": "head",
        "importance_weight": 0.1,
    }
    return Arm(selector, (TEACHER,), {"kv": {"selection": selection}, "align": SAME_MODEL})


# `full` drops nothing, so its six slots are resampled to the three latents.
FULL = Arm("full", (TEACHER,), {"kv": {"selection": {"selector": "full"}}, "align": {**SAME_MODEL, "time": "linear"}})
SHUFFLED = Arm(
    "shuffled KV", (TEACHER,), _arm("r_kv").changes | {"kv": {**_arm("r_kv").changes["kv"], "control": "shuffled"}}
)
ARMS = (*map(_arm, SELECTORS), FULL, NO_KV, SHUFFLED)


class Selectors(Comparison):
    """A comparison whose teacher is the student before it learns to reason in latents."""

    def teachers(self, models: dict[ModelName, Pretrained]) -> dict[str, Path]:
        """The first student instead of the demo's teachers."""
        return {TEACHER: models["student"].path}


def make(output: Path, settings: Settings, seeds: Sequence[int]) -> Comparison:
    """The comparison. Rates and steps were chosen on validation items of seed 0."""
    settings = replace(
        settings,
        fillers=FILLERS,
        pretrain_steps=PRETRAIN_STEPS,
        pretrain_lr=PRETRAIN_RATE,
        test=1000,
        arm_steps=STEPS,
        arm_lr=RATE,
        evaluations=2,
        ranks=1,
    )
    return Selectors(ARMS, output, settings, seeds)


if __name__ == "__main__":
    run(__doc__, "outputs/selectors", make)

"""Every selector under real 2x eviction: `python -m experiments.comparisons.selectors`.

The reasoning holds three running values among three fillers, at places drawn per question, and three of these six
tokens leave the teacher: who keeps the values? One teacher, so that a slot holds one token; scope `sample`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from experiments.comparisons.base import NO_KV, Comparison, Way, run
from experiments.demo.settings import LATENTS, TEACHERS, Settings
from kvcore.plan import SELECTORS

TEACHER = TEACHERS[:1]
FILLERS = 3


def _way(selector: str) -> Way:
    selection = {"selector": selector, "budget": LATENTS, "span": "reasoning", "scope": "sample"}
    return Way(selector, TEACHER, {"kv": {"selection": selection}})


# `full` evicts nothing, so that its six slots are resampled to the three latents.
FULL = Way("full", TEACHER, {"kv": {"selection": {"selector": "full"}}, "align": {"time": "linear"}})
SHUFFLED = Way("shuffled KV", TEACHER, _way("r_kv").changes | {"kv": {"control": "shuffled"}})
WAYS = (*(_way(name) for name in SELECTORS if name != "full"), FULL, NO_KV, SHUFFLED)


def make(output: Path, settings: Settings, seeds: int) -> Comparison:
    """The comparison. The rates let teacher and student solve this task in writing; the second teacher is not asked."""
    steps = {"teacher_a": 1500, "teacher_b": 10, "student": 1500}
    settings = replace(
        settings,
        fillers=FILLERS,
        pretrain_steps=steps,
        pretrain_lr=3e-3,
        test=1000,
        arm_steps=240,
        arm_lr=4e-3,
        evaluations=2,
    )
    return Comparison(WAYS, output, settings, seeds)


if __name__ == "__main__":
    run(__doc__, "outputs/selectors", make)

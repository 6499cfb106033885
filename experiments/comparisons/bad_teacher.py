"""Compares fusion strategies with two good teachers and one that has random weights.

Does routing give the bad teacher less weight, and does this improve accuracy? All arms start from the same student and
take the same small number of steps, at which equal weights have not caught up yet. Then each strategy continues from
the run with equal weights, as the second and third stage of `configs/train/three_stage.yaml` do. The results are in
docs/results.md.

Examples:
  python -m experiments.comparisons.bad_teacher
  python -m experiments.comparisons.bad_teacher --quick --seeds 1 --output outputs/bad_teacher
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import AutoTokenizer

from experiments.comparisons.base import NO_KV, Arm, Comparison, run
from experiments.demo.demo_config import TEACHERS, Config, ModelName, Settings
from experiments.demo.make_models import make_model
from experiments.demo.pretrain import Pretrained

BAD = "bad_teacher"
THREE = (*TEACHERS, BAD)
BAD_SEED = 77
STEPS, MORE_STEPS, RATE = 120, 60, 4e-3

SIMILARITY: Config = {
    "kind": "similarity",
    "metric": "cosine",
    "temperature": 0.1,
    # The first student has been pretrained on the reasoning.
    "warmup_ratio": 0.0,
}
LEARNABLE: Config = {"kind": "learnable", "router": "mlp", "temperature": 0.3}
FUSIONS: dict[str, Config] = {"fixed": {"kind": "fixed"}, "similarity": SIMILARITY, "learnable": LEARNABLE}


def _more(fuse: Config) -> Config:
    return {"fuse": fuse, "run": {"steps": MORE_STEPS, "eval_every": MORE_STEPS // 3}}


ARMS = (
    Arm("two good teachers"),
    *(Arm(kind, THREE, {"fuse": fuse}) for kind, fuse in FUSIONS.items()),
    NO_KV,
    Arm("shuffled KV", THREE, {"kv": {"control": "shuffled"}}),
    *(Arm(f"fixed then {kind}", THREE, _more(fuse), start="fixed") for kind, fuse in FUSIONS.items()),
    Arm("similarity then learnable", THREE, _more(LEARNABLE), start="fixed then similarity"),
)


class BadTeacher(Comparison):
    """A comparison with a third, untrained teacher."""

    def teachers(self, models: dict[ModelName, Pretrained]) -> dict[str, Path]:
        """The demo's two teachers, and one with random weights that has the shape and tokenizer of the second."""
        bad = self.paths.output / "runs" / BAD
        make_model("teacher_b", AutoTokenizer.from_pretrained(models["teacher_b"].path), bad, BAD_SEED)
        return super().teachers(models) | {BAD: bad}


def make(output: Path, settings: Settings, seeds: Sequence[int]) -> Comparison:
    """The comparison.

    Steps, learning rate and temperatures were chosen on validation items of seed 0, and the router's loss on those of
    seeds 3 to 5.
    """
    settings = replace(settings, test=1000, arm_steps=STEPS, arm_lr=RATE, evaluations=3)
    return BadTeacher(ARMS, output, settings, seeds)


if __name__ == "__main__":
    run(__doc__, "outputs/bad_teacher", make)

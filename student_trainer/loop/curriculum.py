"""The curriculum of latent steps (LOTUS, arXiv 2606.31779): in each stage one more step of the reasoning is latent."""

from __future__ import annotations

from dataclasses import dataclass

from kvcore.errors import FieldError
from student_trainer.config import TrainConfig
from student_trainer.config_checks import step_blocks
from student_trainer.loop.sample_order import SampleOrder


@dataclass(frozen=True, slots=True)
class Curriculum:
    """`stages` of `steps_per_stage` optimiser steps; the last one lasts until the run ends."""

    stages: int
    steps_per_stage: int

    def stage(self, step: int) -> int:
        """The stage, counted from 1, of the optimiser step that follows `step` steps."""
        return min(self.stages, 1 + step // self.steps_per_stage)


def curriculum_of(config: TrainConfig, order: SampleOrder) -> Curriculum | None:
    """The curriculum of a run, with one stage per block of latents; None if it has none.

    Raises:
        FieldError: the run ends before its last stage, so all reasoning would never be latent in training.
    """
    blocks, epochs = step_blocks(config), config.run.curriculum_epochs
    if blocks is None or epochs is None:
        return None
    curriculum = Curriculum(blocks.blocks, order.steps_in(epochs))
    before_last = (curriculum.stages - 1) * curriculum.steps_per_stage
    if before_last >= order.steps:
        raise FieldError(
            "run.curriculum_epochs",
            f"{curriculum.stages} stages of {curriculum.steps_per_stage} steps need more than {before_last} steps, but "
            f"the run has {order.steps}; lower it, or train longer",
        )
    return curriculum

"""Loads the model that is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvcore.models.context import check_context
from kvcore.models.files import model_directory
from kvcore.tensors.projections import kv_projections
from student_trainer.config import StudentConfig, TrainConfig
from student_trainer.loop.data_survey import Split
from student_trainer.model.latent import LatentStudent, load_reasoning, new_reasoning
from student_trainer.model.lm_head import check_logits
from student_trainer.model.lora import add_lora
from student_trainer.model.partitions import gathered_in_passes
from student_trainer.model.pretrained import load_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_student(
    settings: StudentConfig, seed: int, *, partitioned: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the student, with LoRA adapters if the configuration has them, and checks that it can be trained.

    `partitioned`: each rank keeps only its partition. All ranks must call it then.

    Raises:
        FieldError: it cannot be loaded or trained.
        UnsupportedModelError: its keys and values cannot be captured.
    """
    lm, tokenizer = load_pretrained(
        settings.path, settings.dtype, "student.path", trained=True, partitioned=partitioned
    )
    kv_projections(lm)  # Raises if the student's K/V cannot be captured.
    with gathered_in_passes(lm):
        check_logits(lm, "student.path")
    if settings.lora is not None:
        add_lora(lm, settings.lora, settings.path, seed)
    if settings.gradient_checkpointing:
        lm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return lm, tokenizer


def is_partitioned_at_load(config: TrainConfig) -> bool:
    """Whether no rank needs the whole student: ZeRO-3, without a router, whose judge is a whole copy on every rank."""
    return config.run.zero_stage == 3 and config.fuse.kind != "learnable"


def check_lengths(config: TrainConfig, lm: PreTrainedModel, splits: Sequence[Split]) -> None:
    """Checks that every sample fits into the student's context: its text, or prompt, latents and answer.

    In a curriculum, the training samples must also fit if all blocks of latents but the last one precede the whole
    reasoning. This is slightly more than any stage reads.

    Raises:
        FieldError: one does not.
    """
    latents = config.student.latents if config.student.mode == "latent" else 0
    for field, split in zip(("data.train", "data.val"), splits, strict=False):
        prompt_N, reasoning_N, answer_N = split.tokens_N3.T
        between_N = np.maximum(reasoning_N, latents)
        if config.run.curriculum_epochs is not None and field == "data.train":
            between_N = np.maximum(between_N, reasoning_N + latents - (config.student.latents_per_step or 0))
        longest = int((prompt_N + between_N + answer_N + 1).max())
        check_context(lm.config, longest, field)


def with_latents(lm: PreTrainedModel, config: TrainConfig) -> LatentStudent:
    """The student with the latent parameters saved beside it, or with new ones."""
    settings = config.student
    latent, projects, reasoning = settings.mode == "latent", settings.projection, None
    with gathered_in_passes(lm):
        if latent:
            directory = model_directory(settings.path, "student.path")
            reasoning = load_reasoning(lm, directory, settings.latents, settings.passes, projects=projects)
        if reasoning is None:
            reasoning = new_reasoning(lm, settings.latents, settings.passes, config.run.seed, projects=projects)
    # Parameters that never get a gradient would stop ZeRO from reducing the others.
    reasoning.requires_grad_(latent)
    return LatentStudent(lm, reasoning.to(lm.dtype))

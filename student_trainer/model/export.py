"""Saves the best model for transformers, with the latents, the code that computes them, and a model card.

A student with LoRA is saved with its adapters merged, and once more as the adapter alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from kvcore.errors import KVDistillError
from kvcore.files import new_directory
from kvcore.models.files import weight_files
from kvcore.models.loading import find_model
from kvcore.types import Tensor
from student_trainer.loop.ds_engine import Engine
from student_trainer.loop.rank_failures import shared_failure
from student_trainer.model.latent import save_reasoning
from student_trainer.model.lora import merged, save_adapter
from student_trainer.model.model_card import write_card
from student_trainer.model.prompt_format import PromptFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from student_trainer.loop.training_context import TrainingContext

# The folder of the adapter alone, in the best model of a run with LoRA.
ADAPTER = "adapter"
LM_PREFIX, REASONING_PREFIX = "student.lm.", "student.reasoning."


class UnfaithfulModelError(KVDistillError):
    """A saved model, read back, is not the one that was trained."""

    next_step = "check the free space of the disk; if that is not it, this is a bug: report the student's architecture"

    def __init__(self, directory: Path, problem: str) -> None:
        super().__init__(f"{directory}: the saved model is not the trained one: {problem}")


def save_model(engine: Engine, context: TrainingContext, directory: Path, results: Mapping[str, Any]) -> None:
    """Writes model, tokenizer, latents and model card, and replaces an earlier best model. All ranks must call it.

    Args:
        engine: holds the weights.
        context: the run.
        directory: to write.
        results: what the validation found, for the model card; empty without validation.

    Raises:
        UnfaithfulModelError: what was written is not what was trained; the earlier best model is kept.
        OutputError: the disk is full or cannot be written; the earlier best model is kept.
    """
    weights = engine.weights() | engine.frozen_weights(LM_PREFIX)
    with shared_failure():
        if dist.get_rank() == 0:
            temporary = directory.with_name(f".{directory.name}.tmp")
            with new_directory(temporary):
                _write(weights, context, temporary)
            write_card(context, results, temporary)
            previous = directory.with_name(f".{directory.name}.old")
            shutil.rmtree(previous, ignore_errors=True)
            if directory.exists():
                directory.rename(previous)
            temporary.rename(directory)
            shutil.rmtree(previous, ignore_errors=True)


def _write(weights: dict[str, Tensor], context: TrainingContext, directory: Path) -> None:
    student, settings = context.model.student, context.config.student
    state = _below(LM_PREFIX, weights)
    if settings.lora is not None:
        save_adapter(student.lm, state, directory / ADAPTER)
        state = merged(student.lm, state)
    dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
    state = {name: weight.to(dtype) for name, weight in state.items()} | _buffers(student.lm)
    student.lm.save_pretrained(directory, state_dict=dict(state))
    context.tokenizer.save_pretrained(directory)
    data = context.config.data
    PromptFormat(data.format, data.system_prompt or "").save(directory)
    check_written(student.lm, state, directory)
    if settings.mode == "latent":
        save_reasoning(student.reasoning, _below(REASONING_PREFIX, weights), directory)


def _below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def _buffers(lm: PreTrainedModel) -> dict[str, Tensor]:
    """What a model saves beside its parameters, such as the biases of some routers of experts."""
    saved = lm.state_dict().keys()
    return {name: buffer.cpu() for name, buffer in lm.named_buffers() if name in saved}


def check_written(lm: PreTrainedModel, state: dict[str, Tensor], directory: Path) -> None:
    """Checks that transformers finds a whole model in a directory, with the tensors that were to be saved.

    Args:
        lm: the model, with or without adapters.
        state: its tensors without adapters.
        directory: where it was saved.

    Raises:
        UnfaithfulModelError: it does not.
    """
    from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415 - slow to import

    try:
        source = find_model(str(directory), "run.output_dir")
        source.causal_lm(source.config(), device_map="meta")  # Compares names and shapes, and reads no weights.
    except KVDistillError as error:
        raise UnfaithfulModelError(directory, str(error)) from error
    # Some architectures have other names and shapes on disk than in memory.
    expected: dict[str, Tensor] = revert_weight_conversion(lm, dict(state))
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dictionary
                found, meant = stored.get_tensor(name), expected.pop(name, None)
                if meant is None or found.dtype != meant.dtype or not found.equal(meant):
                    raise UnfaithfulModelError(directory, f"{name} differs from the trained weights")
    left_out = [name for name in expected if name not in (lm._keys_to_ignore_on_save or ())]  # noqa: SLF001
    if left_out:
        raise UnfaithfulModelError(directory, f"{left_out[0]} was not written")

"""Saves the best model: what transformers loads, with the latent parameters in a file next to it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from student_trainer.loop.ds_engine import Engine
from student_trainer.model.latent import save_reasoning

if TYPE_CHECKING:
    from student_trainer.loop.training_context import TrainingContext

LM_PREFIX, REASONING_PREFIX = "student.lm.", "student.reasoning."


def save_model(engine: Engine, context: TrainingContext, directory: Path) -> None:
    """Writes model, tokenizer and latent parameters, and replaces an earlier best model. All ranks must call it."""
    weights = engine.weights()
    if dist.get_rank() == 0:
        dtype = torch.bfloat16 if context.config.student.dtype == "bf16" else torch.float32
        lm_state = {
            name.removeprefix(LM_PREFIX): w.to(dtype) for name, w in weights.items() if name.startswith(LM_PREFIX)
        }
        temporary = directory.with_name(f".{directory.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        context.model.student.lm.save_pretrained(temporary, state_dict=lm_state)
        context.tokenizer.save_pretrained(temporary)
        if context.config.student.mode == "latent":
            latent = {
                name.removeprefix(REASONING_PREFIX): w
                for name, w in weights.items()
                if name.startswith(REASONING_PREFIX)
            }
            save_reasoning(context.model.student.reasoning, latent, temporary)
        previous = directory.with_name(f".{directory.name}.old")
        shutil.rmtree(previous, ignore_errors=True)
        if directory.exists():
            directory.rename(previous)
        temporary.rename(directory)
        shutil.rmtree(previous, ignore_errors=True)
    dist.barrier()

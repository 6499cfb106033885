"""Loads the model to evaluate: a latent student, or any causal language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM

from evaluation.latent_lm import LatentLM
from student_trainer.model.latent import saved_reasoning
from student_trainer.model.pretrained import DTypeName, find_device, load_pretrained

_FIELD = "--model_path"
_HFLM: Any = HFLM


def load_model(path: str, dtype: DTypeName, device: str, batch_size: int) -> Any:
    """Loads a model with lm-eval's model interface.

    Args:
        path: a directory or hub id. A directory with latent parameters is loaded as a latent student.
        dtype: dtype of the weights; `auto` keeps the saved one.
        device: auto, cpu, cuda or cuda:N.
        batch_size: prompts per batch.

    Raises:
        FieldError: the model cannot be loaded completely, or the device does not exist.
    """
    target: Any = find_device(device, "--device")
    lm, tokenizer = load_pretrained(path, dtype, _FIELD)
    reasoning = saved_reasoning(lm, Path(path), _FIELD)
    lm = lm.to(target)
    if reasoning is None:
        return _HFLM(lm, tokenizer=tokenizer, batch_size=batch_size)
    return LatentLM(lm, reasoning.to(lm.device, lm.dtype), tokenizer, batch_size)

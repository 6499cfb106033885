"""Loads the model to evaluate: a latent student, or any causal language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from evaluation.latent_lm import LatentLM
from kvcore.errors import FieldError
from student_trainer.model.latent import LATENT_CONFIG, LATENT_WEIGHTS, load_reasoning
from student_trainer.model.pretrained import DTypeName, load_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from student_trainer.model.latent import LatentReasoning

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
    target: Any = _device(device)
    lm, tokenizer = load_pretrained(path, dtype, _FIELD)
    reasoning = _latents(lm, Path(path))
    lm = lm.to(target)
    if reasoning is None:
        return _HFLM(lm, tokenizer=tokenizer, batch_size=batch_size)
    return LatentLM(lm, reasoning.to(lm.device, lm.dtype), tokenizer, batch_size)


def _latents(lm: PreTrainedModel, directory: Path) -> LatentReasoning | None:
    files = [directory / name for name in (LATENT_CONFIG, LATENT_WEIGHTS)]
    present = [file.is_file() for file in files]
    if not any(present):
        return None
    if not all(present):
        missing = files[present.index(False)]
        raise FieldError(_FIELD, f"{directory} is a latent student, but {missing.name} is missing")
    settings = json.loads(files[0].read_text(encoding="utf-8"))
    return load_reasoning(lm, directory, settings["latents"], settings["passes"])


def _device(name: str) -> torch.device:
    found = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if found else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= found:
        raise FieldError("--device", f"'{name}' does not exist; CUDA devices found: {found}")
    return device

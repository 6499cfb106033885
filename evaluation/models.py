"""The model that is evaluated: a latent student, or any causal language model."""

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
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from student_trainer.model.latent import LatentReasoning

_FIELD = "--model_path"
_HFLM: Any = HFLM


def load_model(path: str, dtype: DTypeName, device: str, batch_size: int) -> Any:
    """The model behind lm-eval's interface.

    Args:
        path: a directory or hub id. With latents' parameters beside the weights it thinks in latents.
        dtype: of the weights; `auto` as they were saved.
        device: auto, cpu, cuda or cuda:N.
        batch_size: questions read at once.

    Raises:
        FieldError: the model cannot be loaded whole, or the device is not there.
    """
    place = _device(device)
    lm, tokenizer = load_pretrained(path, dtype, _FIELD)
    reasoning = _latents(lm, Path(path))
    return _behind_interface(lm.to(place), reasoning, tokenizer, batch_size)  # pyright: ignore[reportArgumentType]


def _behind_interface(
    lm: PreTrainedModel, reasoning: LatentReasoning | None, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Any:
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
        raise FieldError(_FIELD, f"{directory} is a student that thinks in latents, but {missing.name} is missing")
    settings = json.loads(files[0].read_text(encoding="utf-8"))
    return load_reasoning(lm, directory, settings["latents"], settings["passes"])


def _device(name: str) -> torch.device:
    found = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if found else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= found:
        raise FieldError("--device", f"there is no '{name}' here; CUDA devices found: {found}")
    return device

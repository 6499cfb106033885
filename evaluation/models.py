"""The model that is evaluated: a latent student, or any causal language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM

from evaluation.latent_lm import LatentLM
from student_trainer.model.latent import saved_reasoning
from student_trainer.model.pretrained import DTypeName, find_device, load_pretrained

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
    place = find_device(device, "--device")
    lm, tokenizer = load_pretrained(path, dtype, _FIELD)
    reasoning = saved_reasoning(lm, Path(path), _FIELD)
    return _behind_interface(lm.to(place), reasoning, tokenizer, batch_size)  # pyright: ignore[reportArgumentType]


def _behind_interface(
    lm: PreTrainedModel, reasoning: LatentReasoning | None, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Any:
    if reasoning is None:
        return _HFLM(lm, tokenizer=tokenizer, batch_size=batch_size)
    return LatentLM(lm, reasoning.to(lm.device, lm.dtype), tokenizer, batch_size)

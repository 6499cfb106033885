"""Loads the model to evaluate: a latent student, or any causal language model."""

from __future__ import annotations

from typing import Any

from evaluation.latent_lm import LatentLM
from evaluation.text_lm import TextLM
from kvcore.errors import FieldError
from kvcore.models.files import model_directory
from student_trainer.model.latent import saved_reasoning
from student_trainer.model.pretrained import DTypeName, find_device, load_pretrained
from student_trainer.model.prompt_format import PLAIN, PromptFormat, saved_format

_FIELD = "--model_path"


def load_model(
    path: str, dtype: DTypeName, device: str, batch_size: int, style: str = "auto", system_prompt: str | None = None
) -> TextLM:
    """Loads a model with lm-eval's model interface.

    Args:
        path: a directory or hub id. With latent parameters it is loaded as a latent student.
        dtype: dtype of the weights; `auto` keeps the saved one.
        device: auto, cpu, cuda or cuda:N.
        batch_size: prompts per batch.
        style: how prompts are read: `plain`, `chat`, or `auto`, which is as in the model's training.
        system_prompt: system message of chats; None for the one of the training.

    Raises:
        FieldError: the model cannot be loaded completely, or the device does not exist.
    """
    target: Any = find_device(device, "--device")
    lm, tokenizer = load_pretrained(path, dtype, _FIELD)
    directory = model_directory(path, _FIELD)
    reasoning = saved_reasoning(lm, directory, _FIELD)
    prompt_format = _prompt_format(saved_format(directory, _FIELD), style, system_prompt)
    lm = lm.to(target)
    if reasoning is None:
        return TextLM(lm, tokenizer, batch_size, prompt_format)
    return LatentLM(lm, reasoning.to(lm.device, lm.dtype), tokenizer, batch_size, prompt_format)


def _prompt_format(trained: PromptFormat, style: str, system_prompt: str | None) -> PromptFormat:
    chat = trained.format == "chat" if style == "auto" else style == "chat"
    if not chat and system_prompt is not None:
        raise FieldError("--system_prompt", "needs --format chat, since this model was trained on plain text")
    return PromptFormat("chat", trained.system_prompt if system_prompt is None else system_prompt) if chat else PLAIN

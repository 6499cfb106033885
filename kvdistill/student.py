"""Loads a trained student, or any causal language model, and generates text with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data.collate import Collator
from kvcore.errors import FieldError
from kvcore.types import Tensor
from student_trainer.model.latent import LatentReasoning, LatentStudent, saved_reasoning
from student_trainer.model.pretrained import DTypeName, find_device, load_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Student:
    """A causal language model. A latent student reasons in its latents before it answers. `load_student` creates it.

    Args:
        lm: the language model, on its device.
        tokenizer: its fast tokenizer.
        reasoning: the latent parameters; None for a model without latents.
    """

    def __init__(
        self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reasoning: LatentReasoning | None
    ) -> None:
        self.lm, self.tokenizer = lm.eval(), tokenizer
        self._latent = None if reasoning is None else LatentStudent(lm, reasoning).eval()
        self._collator = Collator(tokenizer, max_tokens=0)

    @property
    def latents(self) -> int:
        """Number of latent positions; 0 for a model without latents."""
        return 0 if self._latent is None else self._latent.reasoning.latents

    @torch.inference_mode()
    def generate(self, prompts: str | Sequence[str], max_new_tokens: int = 256, *, batch_size: int = 8) -> list[str]:
        """Greedy continuations of prompts, as `kvdistill eval` scores them.

        Args:
            prompts: one or more texts, in the format of the training data.
            max_new_tokens: maximum number of tokens; the end-of-sequence token ends a continuation earlier.
            batch_size: prompts per batch.

        Returns:
            the continuation of each prompt, without the prompt.

        Raises:
            FieldError: a prompt is empty, or a number is not positive.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise FieldError(name, f"expected at least 1; got {value}")
        for index, text in enumerate(texts):
            if not text:
                raise FieldError(f"prompts.{index}", "expected a text, got an empty one")
        batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
        return [answer for batch in batches for answer in self._answers(batch, max_new_tokens)]

    def _answers(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        ids_BP, mask_BP = (tensor.to(self.lm.device) for tensor in self._collator.prompts(prompts))
        inputs: dict[str, Tensor] = {"input_ids": ids_BP}
        mask_BT = mask_BP
        if self._latent is not None:
            inputs_BTE, mask_BT = self._latent.think(ids_BP, mask_BP)
            inputs = {"inputs_embeds": inputs_BTE}
        lm: Any = self.lm
        pad = self._pad_id()
        tokens_BT = lm.generate(
            **inputs, attention_mask=mask_BT.long(), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad
        )
        # With embeddings as inputs, transformers returns only the new tokens.
        start = 0 if self._latent is not None else ids_BP.shape[1]
        return [self._text(row) for row in tokens_BT[:, start:].tolist()]

    def _pad_id(self) -> int:
        tokenizer: Any = self.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def _text(self, ids: list[int]) -> str:
        if self.tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(self.tokenizer.eos_token_id)]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def load_student(path: str | Path, *, dtype: DTypeName = "auto", device: str = "auto") -> Student:
    """Loads a `best_model` of a run, latent or not, or any causal language model.

    Args:
        path: a directory or hub id. A directory with latent parameters is loaded as a latent student.
        dtype: dtype of the weights; `auto` keeps the saved one.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        FieldError: the model cannot be loaded completely, or the device does not exist.
    """
    target: Any = find_device(device, "device")
    lm, tokenizer = load_pretrained(str(path), dtype, "path")
    reasoning = saved_reasoning(lm, Path(path), "path")
    lm.to(target)
    return Student(lm, tokenizer, None if reasoning is None else reasoning.to(target, lm.dtype))

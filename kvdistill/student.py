"""Loads a trained student, or any causal language model, generates text with it, and shows its latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from kvcore.config import parse
from kvcore.errors import FieldError
from kvcore.models.context import context_length
from kvcore.models.files import model_directory
from kvcore.tensors.selectors.random import sample_seed
from kvcore.types import Tensor
from kvdistill.generation_settings import GenerationSettings, LoadingSettings, ThinkingSettings
from kvdistill.prompts import Prompt, listed, token_ids
from kvdistill.thoughts import Thoughts, think
from student_trainer.model.generation import (
    Answer,
    Choose,
    Row,
    Sampled,
    Start,
    TextEnd,
    after_latents,
    after_prompt,
    end_tokens,
    greedy,
    left_padded,
    shortened,
    steps,
)
from student_trainer.model.latent import LatentReasoning, LatentStudent, saved_reasoning
from student_trainer.model.pretrained import DTypeName, find_device, load_pretrained
from student_trainer.model.prompt_format import PromptFormat, saved_format

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ItemT = TypeVar("ItemT")


class AnswerStream(Iterator[str]):
    """An answer, piece by piece. `answer`: the whole answer, None until the last piece was read."""

    def __init__(self, rows: Iterator[list[Row]], end: TextEnd) -> None:
        self.answer: Answer | None = None
        self._pieces = self._read(rows, end)

    def __next__(self) -> str:
        """The next piece of the text."""
        return next(self._pieces)

    def _read(self, rows: Iterator[list[Row]], end: TextEnd) -> Iterator[str]:
        shown, answer = "", None
        for (row,) in rows:
            answer = end.answer(row)
            # The bytes of an incomplete character are decoded as this one.
            if not answer.text.endswith("\ufffd"):
                yield from filter(None, [answer.text[len(shown) :]])
                shown = answer.text
        assert answer is not None, "at least one token is generated"
        yield from filter(None, [answer.text[len(shown) :]])
        self.answer = answer


class Student:
    """A causal language model. A latent student reasons in its latents before it answers. `load_student` creates it.

    All methods take the settings of `GenerationSettings` by name:

    - `format`: how a text becomes a prompt. `plain`: as it is. `question`: between `Question:` and `Answer:`. `chat`:
      as a user's message in the tokenizer's chat template. By default as the student was trained. A conversation, which
      is a list of messages with `role` and `content`, always uses the chat template.
    - `system_prompt`: the system message of chats that have none, by default the one of the training.
    - `latents`, `passes`: fewer latents, or another number of passes over them, than in training.
    - `batch_size`: prompts per batch, 8 by default.
    - for generation: `temperature` (0, the default, is greedy), `top_p`, and `seed`.

    Args:
        lm: the language model, on its device.
        tokenizer: its fast tokenizer.
        reasoning: the latent parameters; None for a model without latents.
        trained: how it read its prompts in training.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reasoning: LatentReasoning | None,
        trained: PromptFormat,
    ) -> None:
        self.lm, self.tokenizer, self._trained = lm.eval(), tokenizer, trained
        self._latent = None if reasoning is None else LatentStudent(lm, reasoning).eval()
        self._end = TextEnd(tokenizer, end_tokens(lm, tokenizer))

    @property
    def latents(self) -> int:
        """Number of latent positions; 0 for a model without latents."""
        return 0 if self._latent is None else self._latent.reasoning.latents

    @property
    def passes(self) -> int:
        """Number of passes over the latents; 0 for a model without latents."""
        return 0 if self._latent is None else self._latent.reasoning.passes

    def generate(self, prompts: Prompt | Sequence[Prompt], max_new_tokens: int = 256, **settings: Any) -> list[str]:
        """The continuation of each prompt, without the prompt; by default as `kvdistill eval` scores it.

        Args:
            prompts: one or more texts or conversations.
            max_new_tokens: maximum number of tokens; an end token ends a continuation earlier.
            settings: further fields of `GenerationSettings`.

        Raises:
            FieldError: a prompt is empty or too long, or a setting is not possible with this model.
        """
        return [answer.text for answer in self.answer(prompts, max_new_tokens, **settings)]

    def answer(self, prompts: Prompt | Sequence[Prompt], max_new_tokens: int = 256, **settings: Any) -> list[Answer]:
        """Like `generate`, but also returns whether each text ended by itself, and the number of forward passes."""
        wanted = parse({"max_new_tokens": max_new_tokens, **settings}, GenerationSettings)
        prompt_ids = self._read(listed(prompts), wanted, max_new_tokens)
        rows = [row for batch in _batches(prompt_ids, wanted.batch_size) for row in self._rows(batch, wanted)]
        return [self._end.answer(row) for row in rows]

    def stream(self, prompt: Prompt, max_new_tokens: int = 256, **settings: Any) -> AnswerStream:
        """The continuation of one prompt, piece by piece as it is generated. Arguments as for `generate`."""
        wanted = parse({"max_new_tokens": max_new_tokens, **settings}, GenerationSettings)
        prompt_ids = self._read(listed(prompt), wanted, max_new_tokens)
        if len(prompt_ids) != 1:
            raise FieldError("prompt", f"expected one prompt to stream; got {len(prompt_ids)}")
        return AnswerStream(self._steps(prompt_ids, wanted), self._end)

    def think(self, prompts: Prompt | Sequence[Prompt], *, top: int = 5, **settings: Any) -> list[Thoughts]:
        """The latents of each prompt after every pass, and the most likely token in the place of each.

        Args:
            prompts: one or more texts or conversations.
            top: number of tokens to return for each latent.
            settings: fields of `ThinkingSettings`.

        Raises:
            FieldError: this model has no latents, or as for `generate`.
        """
        wanted = parse(settings, ThinkingSettings)
        student = self._student(wanted)
        if student is None:
            raise FieldError("model", "this model has no latents; only students of latent runs have latents")
        if not 1 <= top <= self.lm.config.get_text_config().vocab_size:
            raise FieldError("top", f"expected at least 1 and at most the size of the vocabulary; got {top}")
        prompt_ids = self._read(listed(prompts), wanted, new_tokens=0)
        batches = _batches(prompt_ids, wanted.batch_size)
        return [thoughts for batch in batches for thoughts in think(student, self.tokenizer, batch, top)]

    @torch.no_grad()
    def prompt_embeddings(self, prompts: Prompt | Sequence[Prompt], **settings: Any) -> list[Tensor]:
        """The input embeddings that the language model reads before each answer, for engines that continue from these.

        The answer depends only on these, so the language model alone computes the answers of `generate` from them.

        Args:
            prompts: one or more texts or conversations.
            settings: fields of `ThinkingSettings`.

        Returns:
            for each prompt [T,E]: the embeddings of its tokens, then of its latents after the last pass. On the CPU,
            in the model's dtype.

        Raises:
            FieldError: as for `generate`.
        """
        wanted = parse(settings, ThinkingSettings)
        student, embeddings = self._student(wanted), list[Tensor]()
        for batch in _batches(self._read(listed(prompts), wanted, new_tokens=0), wanted.batch_size):
            ids_BT, mask_BT = left_padded(batch, self.lm.device)
            inputs_BTE = self.lm.get_input_embeddings()(ids_BT)
            if student is not None:
                thought = student.think(student.read_prompt(ids_BT, mask_BT))
                inputs_BTE, mask_BT = thought.inputs(), thought.mask()
            embeddings += [row_TE[kept_T].cpu() for row_TE, kept_T in zip(inputs_BTE, mask_BT, strict=True)]
        return embeddings

    def _rows(self, prompt_ids: Sequence[Sequence[int]], wanted: GenerationSettings) -> list[Row]:
        return list(self._steps(prompt_ids, wanted))[-1]

    @torch.inference_mode()
    def _steps(self, prompt_ids: Sequence[Sequence[int]], wanted: GenerationSettings) -> Iterator[list[Row]]:
        choose: Choose = greedy
        if wanted.temperature:
            seeds = [sample_seed(wanted.seed, ids) for ids in prompt_ids]
            choose = Sampled(wanted.temperature, wanted.top_p, seeds)
        student, tensors = self._student(wanted), left_padded(prompt_ids, self.lm.device)
        start: Start = after_prompt(*tensors) if student is None else after_latents(student, *tensors)
        yield from steps(self.lm, start, wanted.max_new_tokens, self._end, choose)

    def _student(self, wanted: ThinkingSettings) -> LatentStudent | None:
        """The latent student that thinks as long as wanted."""
        asked = wanted.latents or wanted.passes
        if self._latent is None:
            if asked:
                raise FieldError("latents" if wanted.latents else "passes", "this model has no latents; leave it out")
            return None
        if (wanted.latents or 0) > self.latents:
            raise FieldError(
                "latents", f"this student was trained with {self.latents} and cannot use more; got {wanted.latents}"
            )
        return shortened(self._latent, wanted.latents, wanted.passes) if asked else self._latent

    def _read(self, prompts: Sequence[Prompt], wanted: ThinkingSettings, new_tokens: int) -> list[list[int]]:
        """The tokens of prompts, which must leave room for the latents and the new tokens."""
        student = self._student(wanted)
        latents = 0 if student is None else student.reasoning.latents
        limit = context_length(self.lm.config)
        prompt_ids = token_ids(self.tokenizer, prompts, wanted, self._trained)
        for number, ids in enumerate(prompt_ids):
            room = new_tokens if limit is None else limit[0] - len(ids) - latents
            if limit is not None and room < new_tokens:
                raise FieldError(
                    f"prompts.{number}",
                    f"its {len(ids)} tokens and {latents} latents leave room for {max(0, room)} new tokens in this "
                    f"model's context of {limit[0]} ({limit[1]}); {new_tokens} were requested",
                )
        return prompt_ids


def _batches(items: Sequence[ItemT], size: int) -> Iterator[Sequence[ItemT]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def load_student(path: str | Path, *, dtype: DTypeName = "auto", device: str = "auto") -> Student:
    """Loads a `best_model` of a run, latent or not, or any causal language model.

    Args:
        path: a directory or hub id. With latent parameters it is loaded as a latent student.
        dtype: dtype of the weights; `auto` keeps the saved one.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        FieldError: the model cannot be loaded completely, or the device does not exist.
    """
    parse({"device": device, "dtype": dtype}, LoadingSettings)  # Raises if they are misspelt.
    target: Any = find_device(device, "device")
    lm, tokenizer = load_pretrained(str(path), dtype, "path")
    directory = model_directory(str(path), "path")
    reasoning = saved_reasoning(lm, directory, "path")
    lm.to(target)
    latent = None if reasoning is None else reasoning.to(target, lm.dtype)
    return Student(lm, tokenizer, latent, saved_format(directory, "path"))

"""Collates records into padded tensors for the student.

Prompt, reasoning and answer are tokenised separately, so that training uses the same prompt tokens as inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from data.part_reader import PartReader
from data.reading_check import check_reading
from data.reasoning_steps import StepBlocks, after_steps
from data.records import Record
from kvcore.errors import FieldError
from kvcore.tensors.chat import ChatTemplate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from kvcore.types import Tensor


@dataclass(frozen=True, slots=True)
class StudentTokens:
    """One record in the student's tokens.

    `byte_ends`: where each token ends in the UTF-8 bytes of the record's text; -1 if it has no exact end.
    """

    prompt_ids: tuple[int, ...]
    reasoning_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    byte_ends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StudentBatch:
    """One micro-batch of the student.

    `prompt_*_BP` is left-padded, so that what follows starts in the same column. `answer_*_BA` (answer and end of
    sequence) is right-padded. `text_*_BT` (prompt, reasoning, answer and end of sequence) is right-padded;
    `text_target_BT` is True for tokens to predict (from the reasoning on). `continuation_*_BR` is the text without the
    prompt, right-padded. `following_*_BF`: what follows the latents, right-padded: the steps of the reasoning that are
    still text in a stage of a curriculum, then the answer and the end of sequence. `step_*_BM`: the token of a
    reasoning step that each latent is to predict, and where there is one. M is the number of latents that take part; it
    is 0 without step blocks, where all of them do.
    """

    records: tuple[Record, ...]
    prompt_ids_BP: Tensor
    prompt_mask_BP: Tensor
    answer_ids_BA: Tensor
    answer_mask_BA: Tensor
    text_ids_BT: Tensor
    text_mask_BT: Tensor
    text_target_BT: Tensor
    text_byte_ends_BT: Tensor
    continuation_ids_BR: Tensor
    continuation_mask_BR: Tensor
    following_ids_BF: Tensor
    following_mask_BF: Tensor
    step_ids_BM: Tensor
    step_mask_BM: Tensor

    def to(self, device: torch.device) -> StudentBatch:
        """Returns the batch on another device."""
        tensors = (getattr(self, field.name).to(device) for field in fields(self)[1:])
        return StudentBatch(self.records, *tensors)

    def first(self, count: int) -> StudentBatch:
        """Returns the first `count` records, with unchanged padding."""
        tensors = (getattr(self, field.name)[:count] for field in fields(self)[1:])
        return StudentBatch(self.records[:count], *tensors)


class Collator:
    """Tokenises records, caches their tokens, and pads batches.

    Args:
        tokenizer: the student's fast tokenizer, with an end-of-sequence token.
        max_tokens: maximum length of a record, in student tokens.
        chat: whether prompts are read in the tokenizer's chat template. The end token is the one that ends a turn then,
            and becomes the tokenizer's end-of-sequence token.
        system_prompt: the system message of prompts that have none.
        step_blocks: the blocks of latents that learn the steps of the reasoning.

    Raises:
        FieldError: the tokenizer has no end token, or no usable chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        *,
        chat: bool = False,
        system_prompt: str = "",
        step_blocks: StepBlocks | None = None,
    ) -> None:
        template = ChatTemplate(tokenizer, "student.path") if chat else None
        if template is not None:
            tokenizer.eos_token = template.end_of_turn()
        if tokenizer.eos_token_id is None:
            raise FieldError("student.path", "the student's tokenizer has no end-of-sequence token")
        self._tokenizer, self._reader = tokenizer, PartReader(tokenizer, template, system_prompt)
        self._is_chat, self._step_blocks = chat, step_blocks
        self._max_tokens = max_tokens
        self._eos: int = tokenizer.eos_token_id  # pyright: ignore[reportAttributeAccessIssue]
        self._pad: int = self._eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # pyright: ignore[reportAttributeAccessIssue]
        self._cache: dict[Record, StudentTokens] = {}

    @property
    def end_token(self) -> str:
        """The token that ends a text."""
        return str(self._tokenizer.eos_token)

    def tokens(self, record: Record) -> StudentTokens:
        """Tokenises one record.

        Raises:
            FieldError: the record is longer than `max_tokens`.
        """
        # Keyed by record, since training and validation data may use the same id.
        if record not in self._cache:
            self._cache[record] = self._tokenise(record)
        return self._cache[record]

    def count(self, records: Sequence[Record]) -> NDArray[np.int64]:
        """[B,3]: tokens of each record's prompt, reasoning and answer; faster than `tokens`, and without a limit."""
        return self._reader.count(records)

    def check(self, record: Record) -> list[str]:
        """Checks that the record is read as one text that ends once, and returns warnings: see `check_reading`."""
        tokens = self._tokenise(record)
        continuation = (*tokens.reasoning_ids, *tokens.answer_ids)
        return check_reading(self._tokenizer, record, tokens.prompt_ids, continuation, is_chat=self._is_chat)

    def _tokenise(self, record: Record) -> StudentTokens:
        ids: list[tuple[int, ...]] = []
        byte_ends: list[int] = []
        read_bytes = 0
        parts = (record.prompt, record.reasoning, record.answer)
        read = (self._reader.prompt(record), *map(self._reader.continuation, parts[1:]))
        for part, (part_ids, part_ends) in zip(parts, read, strict=True):
            ids.append(tuple(part_ids))
            byte_ends += [end if end < 0 else end + read_bytes for end in part_ends]
            read_bytes += len(part.encode())
        length = len(byte_ends) + 1
        if length > self._max_tokens:
            raise FieldError(
                "data.max_tokens",
                f"record '{record.id}' has {length} student tokens, the limit is {self._max_tokens}; "
                "raise the limit or remove the record",
            )
        return StudentTokens(ids[0], ids[1], ids[2], tuple(byte_ends))

    def __call__(self, records: Sequence[Record], latent_steps: int | None = None) -> StudentBatch:
        """Collates records into one batch.

        Args:
            records: the batch.
            latent_steps: how many steps of the reasoning are latent in a stage of a curriculum, at least 1 and at most
                the number of step blocks. The steps after them follow as text, except in the last stage. By default the
                reasoning is latent.
        """
        rows = [self.tokens(record) for record in records]
        prompts = [row.prompt_ids for row in rows]
        answers = [(*row.answer_ids, self._eos) for row in rows]
        continuations = [(*row.reasoning_ids, *row.answer_ids, self._eos) for row in rows]
        following = [
            (*self._rest(record, latent_steps), *answer) for record, answer in zip(records, answers, strict=True)
        ]
        steps = [self._steps(record, latent_steps) for record in records]
        texts = [prompt + continuation for prompt, continuation in zip(prompts, continuations, strict=True)]
        targets = [
            (0,) * len(prompt) + (1,) * len(continuation)
            for prompt, continuation in zip(prompts, continuations, strict=True)
        ]
        return StudentBatch(
            tuple(records),
            _pad(prompts, self._pad, left=True),
            _pad([(1,) * len(row) for row in prompts], 0, left=True).bool(),
            _pad(answers, self._pad),
            _pad([(1,) * len(row) for row in answers], 0).bool(),
            _pad(texts, self._pad),
            _pad([(1,) * len(row) for row in texts], 0).bool(),
            _pad(targets, 0).bool(),
            _pad([(*row.byte_ends, -1) for row in rows], -1),
            _pad(continuations, self._pad),
            _pad([(1,) * len(row) for row in continuations], 0).bool(),
            _pad(following, self._pad),
            _pad([(1,) * len(row) for row in following], 0).bool(),
            _pad([ids for ids, _ in steps], 0),
            _pad([mask for _, mask in steps], 0).bool(),
        )

    def _steps(self, record: Record, latent_steps: int | None) -> tuple[list[int], list[int]]:
        blocks = self._step_blocks
        if blocks is None:
            return [], []
        blocks = blocks if latent_steps is None else blocks.first(latent_steps)
        return blocks.targets(record.reasoning, self.step_tokens)

    def _rest(self, record: Record, latent_steps: int | None) -> list[int]:
        """The tokens of the steps that are still text."""
        blocks = self._step_blocks
        if blocks is None or latent_steps is None or latent_steps == blocks.blocks:
            return []
        return self.step_tokens(after_steps(record.reasoning, blocks.kind, latent_steps))

    def step_tokens(self, step: str) -> list[int]:
        """The tokens of one or more steps of a reasoning."""
        return self._reader.continuation(step)[0]

    def record_prompts(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        """Left-padded ids and mask [B,P] of the records' prompts."""
        return self._padded_prompts([self._reader.prompt(record)[0] for record in records])

    def prompts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Left-padded ids and mask [B,P] of prompts as plain text."""
        return self._padded_prompts([self._reader.plain_prompt(text)[0] for text in texts])

    def _padded_prompts(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        return _pad(rows, self._pad, left=True), _pad([[1] * len(row) for row in rows], 0, left=True).bool()


def _pad(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    width = max(len(row) for row in rows)
    padded = [
        [value] * (width - len(row)) + list(row) if left else list(row) + [value] * (width - len(row)) for row in rows
    ]
    return torch.tensor(padded, dtype=torch.long)

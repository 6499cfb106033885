"""Collates records into padded tensors for the student.

Prompt, reasoning and answer are tokenised separately, so that training uses the same prompt tokens as inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from data.records import Record
from kvcore.errors import FieldError
from kvcore.tensors.offsets import read_text

if TYPE_CHECKING:
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
    `text_target_BT` is True for tokens to predict (from the reasoning on).
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
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        if tokenizer.eos_token_id is None:
            raise FieldError("student.path", "the student's tokenizer has no end-of-sequence token")
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._eos: int = tokenizer.eos_token_id  # pyright: ignore[reportAttributeAccessIssue]
        self._pad: int = self._eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # pyright: ignore[reportAttributeAccessIssue]
        self._cache: dict[Record, StudentTokens] = {}

    def tokens(self, record: Record) -> StudentTokens:
        """Tokenises one record.

        Raises:
            FieldError: the record is longer than `max_tokens`.
        """
        # Keyed by record, since training and validation data may use the same id.
        if record not in self._cache:
            self._cache[record] = self._tokenise(record)
        return self._cache[record]

    def _tokenise(self, record: Record) -> StudentTokens:
        ids: list[tuple[int, ...]] = []
        byte_ends: list[int] = []
        read_bytes = 0
        for index, part in enumerate((record.prompt, record.reasoning, record.answer)):
            part_ids, part_ends = read_text(self._tokenizer, part, add_special_tokens=index == 0)
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

    def __call__(self, records: Sequence[Record]) -> StudentBatch:
        """Collates records into one batch."""
        rows = [self.tokens(record) for record in records]
        prompts = [row.prompt_ids for row in rows]
        answers = [(*row.answer_ids, self._eos) for row in rows]
        texts = [(*row.prompt_ids, *row.reasoning_ids, *row.answer_ids, self._eos) for row in rows]
        targets = [
            (0,) * len(row.prompt_ids) + (1,) * (len(text) - len(row.prompt_ids))
            for row, text in zip(rows, texts, strict=True)
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
        )

    def prompts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Left-padded ids and mask [B,P] of prompts."""
        rows = [read_text(self._tokenizer, text, add_special_tokens=True)[0] for text in texts]
        return _pad(rows, self._pad, left=True), _pad([[1] * len(row) for row in rows], 0, left=True).bool()


def _pad(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    width = max(len(row) for row in rows)
    padded = [
        [value] * (width - len(row)) + list(row) if left else list(row) + [value] * (width - len(row)) for row in rows
    ]
    return torch.tensor(padded, dtype=torch.long)

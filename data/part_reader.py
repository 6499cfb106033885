"""Tokenises the parts of a record: prompt, reasoning and answer, each on its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.records import Record
from kvcore.errors import FieldError
from kvcore.tensors.chat import ChatTemplate
from kvcore.tensors.offsets import adds_space, read_continuation, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Token ids, and where each token ends in the UTF-8 bytes of the text that was read; -1 if it has no exact end.
Read = tuple[list[int], list[int]]


class PartReader:
    """Tokenises prompts, and the texts that continue them.

    Args:
        tokenizer: a fast tokenizer.
        template: its chat template, if prompts are read in it.
        system_prompt: the system message of prompts that have none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None = None, system_prompt: str = ""
    ) -> None:
        self._tokenizer, self._template, self._system_prompt = tokenizer, template, system_prompt
        self._adds_space = adds_space(tokenizer)

    def prompt(self, record: Record) -> Read:
        """The tokens of a record's prompt, as training and inference read it. Byte ends are those of the contents."""
        if self._template is not None:
            return self._template.read(record.prompt, record.chat(self._system_prompt))
        _refuse_turns(record)
        return self.plain_prompt(record.prompt)

    def plain_prompt(self, text: str) -> Read:
        """The tokens of a prompt, with the tokenizer's special tokens."""
        return read_text(self._tokenizer, text, add_special_tokens=True)

    def continuation(self, text: str) -> Read:
        """The tokens of a text that continues another one."""
        if self._adds_space:
            return read_continuation(self._tokenizer, text)
        return read_text(self._tokenizer, text, add_special_tokens=False)

    def count(self, records: Sequence[Record]) -> NDArray[np.int64]:
        """[B,3]: the number of tokens of each record's prompt, reasoning and answer."""
        prompts = self._lengths(list(map(self._prompt_text, records)), add_special_tokens=self._template is None)
        reasoning = self._continuation_lengths([record.reasoning for record in records])
        answers = self._continuation_lengths([record.answer for record in records])
        return np.array([prompts, reasoning, answers], dtype=np.int64).T

    def _prompt_text(self, record: Record) -> str:
        if self._template is not None:
            return self._template.render(record.prompt, record.chat(self._system_prompt))
        _refuse_turns(record)
        return record.prompt

    def _continuation_lengths(self, texts: Sequence[str]) -> list[int]:
        if self._adds_space:
            return [len(self.continuation(text)[0]) for text in texts]
        return self._lengths(texts, add_special_tokens=False)

    def _lengths(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[int]:
        tokenizer: Any = self._tokenizer
        encoded = tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]


def _refuse_turns(record: Record) -> None:
    if record.turns:
        raise FieldError(
            "data.format",
            f"'plain' reads prompts as text, but the prompt of record '{record.id}' is a conversation; set it to chat",
        )

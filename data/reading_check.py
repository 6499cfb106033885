"""Checks on one record that a student's tokenizer reads a prompt and its continuation as one text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from data.records import Record
from kvcore.errors import FieldError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELD = "student.path"
_SHOWN = 40


def check_reading(
    tokenizer: PreTrainedTokenizerBase,
    record: Record,
    prompt_ids: Sequence[int],
    continuation_ids: Sequence[int],
    *,
    is_chat: bool,
) -> list[str]:
    """Checks that a record's tokens have no end token too early, at most one BOS, and decode to its text.

    Args:
        tokenizer: the student's.
        record: any record.
        prompt_ids: the tokens of its prompt.
        continuation_ids: the tokens of its reasoning and answer.
        is_chat: whether the prompt's tokens hold a chat template's text, too.

    Returns:
        warnings: characters that the tokenizer does not know, and a chat template without BOS.

    Raises:
        FieldError: one of the three does not hold.
    """
    tokens: Any = tokenizer
    begins = len(list(takewhile(lambda token: token == tokens.bos_token_id, prompt_ids)))
    if not is_chat:
        _refuse_end(tokens, record, prompt_ids)
    if begins > 1:
        raise FieldError(
            FIELD,
            f"record '{record.id}' begins with {begins} x '{tokens.bos_token}': remove the extra one from its "
            "prompt, or from the chat template",
        )
    warnings: list[str] = []
    if is_chat and not begins and tokens("a")["input_ids"][0] == tokens.bos_token_id:
        warnings.append(f"the student's chat template writes no '{tokens.bos_token}', unlike its tokenizer")
    if begins and not record.prompt.startswith(tokens.bos_token):
        prompt_ids = prompt_ids[1:]
    all_ids = [*prompt_ids, *continuation_ids]
    if tokens.unk_token_id is not None and tokens.unk_token_id in all_ids:
        return [*warnings, f"the student's tokenizer reads characters of record '{record.id}' as '{tokens.unk_token}'"]
    backend = tokens.backend_tokenizer
    prompt = _decoded(backend, prompt_ids) if is_chat else record.prompt
    _check_text(backend, record, _decoded(backend, all_ids), prompt + record.reasoning + record.answer)
    return warnings


def _refuse_end(tokens: Any, record: Record, prompt_ids: Sequence[int]) -> None:
    if prompt_ids[-1] == tokens.eos_token_id and not record.prompt.endswith(tokens.eos_token):
        raise FieldError(
            FIELD,
            f"the tokenizer ends every text with '{tokens.eos_token}', so the prompt of record '{record.id}' ends "
            "before its reasoning; set add_eos_token to false in tokenizer_config.json, or remove the token from "
            "post_processor in tokenizer.json",
        )


def _check_text(backend: Any, record: Record, found: str, expected: str) -> None:
    # Some tokenizers put a space before the whole text.
    if not any(_same(backend, found, space + expected) for space in ("", " ")):
        at = next((at for at, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(expected))
        start = max(0, at - _SHOWN // 2)
        raise FieldError(
            FIELD,
            f"the tokens of record '{record.id}' decode to another text: {found[start : start + _SHOWN]!r} instead of "
            f"{expected[start : start + _SHOWN]!r}; use a tokenizer that keeps the text",
        )


def _decoded(backend: Any, ids: Sequence[int]) -> str:
    return str(backend.decode(list(ids), skip_special_tokens=False))


def _same(backend: Any, one: str, other: str) -> bool:
    """Whether two texts are equal, or equal for the tokenizer's normaliser, which may compose or lower characters."""
    normalise = backend.normalizer.normalize_str if backend.normalizer is not None else str
    return one == other or normalise(one) == normalise(other)

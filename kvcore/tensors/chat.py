"""Reads texts through a tokenizer's own chat template.

The template's text is not part of a sample's text: its tokens have no byte end. So two models with different templates
are aligned on the contents, which both read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from kvcore.errors import FieldError
from kvcore.tensors.offsets import UNKNOWN, read_text
from kvcore.types import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters around a number stand for a turn's content, to find the template's own text.
_MARK = "\ue000{}\ue001"


@dataclass(frozen=True, slots=True)
class _Piece:
    """Characters of a sample's text, and where they begin in it and in the rendered text."""

    content: str
    text_start: int
    rendered_start: int


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: a fast tokenizer.
        field: the field that errors name.

    Raises:
        FieldError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, field: str) -> None:
        self._tokenizer, self._field = cast("Any", tokenizer), field
        if not self._tokenizer.chat_template:
            raise FieldError(
                field,
                "the tokenizer has no chat template; use an instruct model, add chat_template.jinja to the model's "
                "directory, or let it read plain text (data.format or teachers.N.format: plain)",
            )
        self._own_texts = lru_cache(maxsize=64)(self._find_own_texts)

    def read(self, text: str, chat: Chat) -> tuple[list[int], list[int]]:
        """Tokenises a sample's text: its turns in the template, the header of the assistant's turn, and the rest.

        Returns:
            token ids and byte ends in `text`, as `read_text` does; tokens that end in the template's own text have -1.

        Raises:
            FieldError: the template refuses the turns, or changes a content by more than its outer spaces.
        """
        rendered, pieces = self._rendered(text, chat)
        ids, ends = read_text(self._tokenizer, rendered, add_special_tokens=False)
        return ids, _ends_in_text(ends, pieces, rendered, text)

    def render(self, text: str, chat: Chat) -> str:
        """The text that `read` tokenises."""
        return self._rendered(text, chat)[0]

    def end_of_turn(self) -> str:
        """The token with which the template ends the assistant's turn.

        Raises:
            FieldError: it has none, or no header of the assistant's turn.
        """
        marks = [_MARK.format(0), _MARK.format(1)]
        header, _, end = self._apply(["user", "assistant"], marks, "", add_header=False).partition(marks[1])
        asked, with_header = (self._apply(["user"], marks[:1], "", add_header=add) for add in (False, True))
        if asked == with_header and header.strip() != asked.strip():
            raise FieldError(self._field, "the chat template writes no header of the assistant's turn before an answer")
        ids: list[int] = self._tokenizer(end, add_special_tokens=False)["input_ids"]
        added: dict[int, Any] = self._tokenizer.added_tokens_decoder
        at = next((at for at, token in enumerate(ids) if token in added), None)
        if at is None or str(self._tokenizer.decode(ids[:at])).strip():
            raise FieldError(
                self._field, f"the chat template ends the assistant's turn with {end!r}, which is not a token"
            )
        return str(added[ids[at]])

    def _rendered(self, text: str, chat: Chat) -> tuple[str, list[_Piece]]:
        roles = tuple(turn.role for turn in chat.turns)
        contents = [text[turn.start : turn.end] for turn in chat.turns]
        whole = self._apply(roles, contents, chat.system_prompt, add_header=True)
        first, *others = self._own_texts(roles, chat.system_prompt)
        pieces: list[_Piece] = []
        at = len(first)
        for turn, content, own in zip(chat.turns, contents, others, strict=True):
            # Many templates trim contents.
            for kept in (content, content.strip(), content.lstrip(), content.rstrip()):
                if whole.startswith(kept + own, at):
                    break
            else:
                raise FieldError(self._field, f"the chat template changes the content of a message: {content[:40]!r}")
            pieces.append(_Piece(kept, turn.start + content.index(kept), at))
            at += len(kept) + len(own)
        if at != len(whole) or not whole.startswith(first):
            raise FieldError(self._field, f"the chat template adds text to some messages: {whole[at:][:40]!r}")
        end = chat.turns[-1].end
        return whole + text[end:], [*pieces, _Piece(text[end:], end, len(whole))]

    def _find_own_texts(self, roles: tuple[str, ...], system_prompt: str) -> list[str]:
        """The template's own text before, between and after the contents of turns with these roles."""
        marks = [_MARK.format(place) for place in range(len(roles))]
        rest = self._apply(roles, marks, system_prompt, add_header=True)
        texts: list[str] = []
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found or mark in rest:
                raise FieldError(self._field, "the chat template does not write each message exactly once and in order")
            texts.append(before)
        return [*texts, rest]

    def _apply(self, roles: Sequence[str], contents: Sequence[str], system_prompt: str, *, add_header: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        if system_prompt:
            messages.insert(0, {"role": "system", "content": system_prompt})
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_header))
        except TemplateError as error:
            shown = ", ".join(message["role"] for message in messages)
            raise FieldError(self._field, f"the chat template refuses the roles {shown}: {error}") from error


def _ends_in_text(ends: Sequence[int], pieces: Sequence[_Piece], rendered: str, text: str) -> list[int]:
    """Byte ends in `rendered` as byte ends in `text`; -1 outside the pieces."""
    found = [UNKNOWN] * len(ends)
    token = 0
    for piece in pieces:
        start = len(rendered[: piece.rendered_start].encode())
        stop, shift = start + len(piece.content.encode()), len(text[: piece.text_start].encode()) - start
        while token < len(ends) and ends[token] <= stop:
            if ends[token] > start:
                found[token] = ends[token] + shift
            token += 1
    return found

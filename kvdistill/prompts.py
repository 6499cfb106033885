"""Prompts as a student reads them: plain texts, questions in the recipe's format, and conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast, get_args

from data.families.base import Question
from data.prompts import prompt_of
from kvcore.errors import FieldError
from kvcore.tensors.chat import ChatTemplate
from kvcore.tensors.offsets import read_text
from kvcore.types import Chat, Role, Turn
from kvdistill.generation_settings import ThinkingSettings
from student_trainer.model.prompt_format import PromptFormat, user_message_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Conversation = Sequence[Mapping[str, str]]
Prompt = str | Conversation
_ROLES = get_args(Role)
# Chinese characters, without those that only other languages use.
_CHINESE = ("一", "鿿")


def listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One or more prompts as a list; a list of messages is one conversation."""
    if isinstance(prompts, str):
        return [prompts]
    given: list[Any] = list(prompts)
    return [given] if given and isinstance(given[0], Mapping) else given


def token_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], settings: ThinkingSettings, trained: PromptFormat
) -> list[list[int]]:
    """The tokens of prompts, in the format of the settings, or else as in training.

    Raises:
        FieldError: a prompt is empty or no conversation, the tokenizer has no chat template for it, or a system prompt
            is set for a text that is not read as a chat.
    """
    style = settings.format or trained.format
    if settings.system_prompt is not None and style != "chat" and any(isinstance(prompt, str) for prompt in prompts):
        raise FieldError("system_prompt", f"needs format 'chat', but this student reads texts as '{style}'")
    system_prompt = trained.system_prompt if settings.system_prompt is None else settings.system_prompt
    return [
        _token_ids(tokenizer, prompt, style, system_prompt, f"prompts.{number}")
        for number, prompt in enumerate(prompts)
    ]


def _token_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, style: str, system_prompt: str, field: str
) -> list[int]:
    if not prompt:
        raise FieldError(field, "expected a text or a conversation, got an empty one")
    if isinstance(prompt, str):
        if style == "chat":
            return user_message_ids(tokenizer, prompt, system_prompt, "format")
        text = _question(prompt) if style == "question" else prompt
        return read_text(tokenizer, text, add_special_tokens=True)[0]
    return _conversation_ids(tokenizer, prompt, system_prompt, field)


def _conversation_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Conversation, system_prompt: str, field: str
) -> list[int]:
    text, turns = "", list[Turn]()
    for message in messages:
        known = message if isinstance(message, Mapping) else {}
        role, content = known.get("role"), known.get("content")
        if role not in _ROLES or not isinstance(content, str):
            roles = ", ".join(_ROLES)
            raise FieldError(field, f"expected messages with a 'role' ({roles}) and a 'content'; got {message!r:.80}")
        turns.append(Turn(cast("Role", role), len(text), len(text) + len(content)))
        text += content
    system_prompt = "" if turns[0].role == "system" else system_prompt
    return ChatTemplate(tokenizer, "format").read(text, Chat(tuple(turns), system_prompt))[0]


def _question(text: str) -> str:
    chinese = any(_CHINESE[0] <= character <= _CHINESE[1] for character in text)
    return prompt_of(Question(stem=text, reasoning="", answer=""), "cot", "zh" if chinese else "en")

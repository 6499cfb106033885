"""How a student read its prompts in training: saved next to its weights, for generation and evaluation."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvcore.errors import FieldError
from kvcore.files import write_json
from kvcore.tensors.chat import ChatTemplate
from kvcore.types import Chat, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_FORMAT = "prompt_format.json"


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """`data.format` and `data.system_prompt` of a run."""

    format: Literal["plain", "chat"] = "plain"
    system_prompt: str = ""

    def save(self, directory: Path) -> None:
        """Writes it next to a student's weights."""
        write_json(directory / PROMPT_FORMAT, asdict(self))


PLAIN = PromptFormat()


def saved_format(directory: Path, field: str) -> PromptFormat:
    """The format with which the model of a directory was trained; `plain` for a model from elsewhere.

    Args:
        directory: the directory from which the model was loaded.
        field: the field of `directory` that errors name.

    Raises:
        FieldError: the file is damaged.
    """
    file = directory / PROMPT_FORMAT
    if not file.is_file():
        return PLAIN
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        format_, system_prompt = saved["format"], saved["system_prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise FieldError(field, f"{file} is damaged; copy it from the run's best_model again") from error
    if format_ not in {"plain", "chat"} or not isinstance(system_prompt, str):
        raise FieldError(field, f"{file}: expected format 'plain' or 'chat' and a system_prompt; got {saved!r:.80}")
    return PromptFormat(format_, system_prompt)


def user_message_ids(tokenizer: PreTrainedTokenizerBase, text: str, system_prompt: str, field: str) -> list[int]:
    """The tokens of a text as a user's message in the tokenizer's chat template, up to the assistant's turn.

    Raises:
        FieldError: the tokenizer has no chat template, or it refuses the message; names `field`.
    """
    return ChatTemplate(tokenizer, field).read(text, Chat((Turn("user", 0, len(text)),), system_prompt))[0]

r"""Prompt templates: turns a question into a record's prompt, reasoning and answer, by style and language.

Style `cot` (`Question: ...\nAnswer:`, the GSM8K format of lm-evaluation-harness) expects reasoning, in text or in
latents. Style `direct` asks for the result only. Evaluation uses the same prompts. The reasoning ends with GSM8K's
marker `####`, so that the answer is only the result.
"""

from __future__ import annotations

from typing import Literal, get_args

from data.families.base import Question
from data.records import Record

Style = Literal["cot", "direct"]
STYLES: tuple[Style, ...] = get_args(Style)

_PROMPTS: dict[tuple[str, Style], str] = {
    ("en", "cot"): "Question: {}\nAnswer:",
    ("en", "direct"): "Question: {}\nGive only the result.\nAnswer:",
    ("zh", "cot"): "问题：{}\n答案：",  # noqa: RUF001 as Chinese is written
    ("zh", "direct"): "问题：{}\n只写结果。\n答案：",  # noqa: RUF001 as Chinese is written
}


def prompt_of(question: Question, style: Style, language: str) -> str:
    """The question's prompt in a style; `language` is en or zh."""
    asked = "\n".join(filter(None, (question.stem, question.options)))
    prompt = _PROMPTS[language, style].format(asked)
    return f"{question.context}\n{prompt}" if question.context else prompt


def record_of(question: Question, style: Style, language: str, record_id: str) -> Record:
    """The question's record in a style; `direct` has no reasoning."""
    reasoning = f" {question.reasoning}\n####" if style == "cot" else ""
    return Record(record_id, prompt_of(question, style, language), reasoning, f" {question.answer}")

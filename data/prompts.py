r"""How a question becomes a record's prompt, reasoning and answer, by style and language.

After the prompt of style `cot` (`Question: ...\nAnswer:`, as lm-evaluation-harness writes GSM8K) the student reasons,
in text or in latents. That of `direct` asks for the result alone. Evaluation asks with the same prompts. The reasoning
ends with GSM8K's mark `####`, so that the answer is the result and nothing else.
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
    """The prompt that asks the question in that style; `language` is en or zh."""
    asked = "\n".join(filter(None, (question.stem, question.options)))
    prompt = _PROMPTS[language, style].format(asked)
    return f"{question.context}\n{prompt}" if question.context else prompt


def record_of(question: Question, style: Style, language: str, record_id: str) -> Record:
    """The question's record in that style; of style `direct` without reasoning."""
    reasoning = f" {question.reasoning}\n####" if style == "cot" else ""
    return Record(record_id, prompt_of(question, style, language), reasoning, f" {question.answer}")

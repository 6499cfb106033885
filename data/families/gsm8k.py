"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): grade-school arithmetic with worked steps."""

from __future__ import annotations

import re

from data.families.base import Family, Question, Row, RowDroppedError, text_of

# Calculator annotations, as in 3*4=<<3*4=12>>12.
_CALCULATOR_NOTE = re.compile(r"<<[^<>]*>>")


def _parse(row: Row) -> Question:
    question = text_of(row, "question")
    reasoning, mark, answer = text_of(row, "answer").rpartition("####")
    if not mark or not answer.strip():
        raise RowDroppedError("no '#### result' in answer")
    steps = _CALCULATOR_NOTE.sub("", reasoning).strip()
    return Question(question, steps, answer.strip().replace(",", ""))


FAMILY = Family(
    name="gsm8k",
    hub="openai/gsm8k",
    configs=("main",),
    columns=("question", "answer"),
    parse=_parse,
    task_type="math_word_problem",
)

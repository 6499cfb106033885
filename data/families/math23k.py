"""Math23K (Wang et al. 2017, D17-1088): Chinese arithmetic word problems.

The equation is the reasoning. Only local copies are read.
"""

from __future__ import annotations

import re

from data.families.base import Family, Question, Row, number_of, text_of

# (2/5) is a fraction, 5(1/2) a mixed number.
_FRACTION = re.compile(r"\((\d+/\d+)\)")


def _parse(row: Row) -> Question:
    question, equation = text_of(row, "original_text"), text_of(row, "equation")
    answer = number_of(row, "ans")
    fraction = _FRACTION.fullmatch(answer)
    answer = fraction[1] if fraction else answer
    return Question(question, f"{equation}={answer}", answer)


FAMILY = Family(
    name="math23k",
    hub=None,
    columns=("original_text", "equation", "ans"),
    parse=_parse,
    task_type="math_word_problem",
    language="zh",
)

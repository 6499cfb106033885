"""SVAMP (Patel et al. 2021, arXiv 2103.07191): one-step arithmetic with distracting numbers.

The equation is the reasoning.
"""

from __future__ import annotations

import re

from data.families.base import Family, Question, Row, number_of, text_of

_WHOLE = re.compile(r"(\d+)\.0\b")


def _parse(row: Row) -> Question:
    body, asked, answer = text_of(row, "Body"), text_of(row, "Question"), number_of(row, "Answer")
    equation = _without_brackets(_WHOLE.sub(r"\1", text_of(row, "Equation")))
    # Some bodies end without a full stop, although the question is a new sentence.
    question = f"{body} {asked}" if body[-1] in ".!?" else f"{body}. {asked}"
    return Question(question, f"{equation} = {answer}", answer)


def _without_brackets(equation: str) -> str:
    """Removes brackets around the whole equation: `( 8 - 3 )` becomes `8 - 3`."""
    inner = equation.removeprefix("( ").removesuffix(" )")
    return inner if len(inner) == len(equation) - 4 and "(" not in inner and ")" not in inner else equation


FAMILY = Family(
    name="svamp",
    hub="ChilleD/SVAMP",
    columns=("Body", "Question", "Equation", "Answer"),
    parse=_parse,
    task_type="math_word_problem",
)

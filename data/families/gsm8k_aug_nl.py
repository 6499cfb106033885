"""GSM8K-Aug-NL: the questions of GSM8K-Aug with steps in natural language, one per line (arXiv 2506.18582).

The columns are those of `gsm8k_aug`, with the same reservation.
"""

from __future__ import annotations

from data.families.base import Family, Question, Row
from data.families.gsm8k_aug import parse_steps


def _parse(row: Row) -> Question:
    return parse_steps(row, "\n")


FAMILY = Family(
    name="gsm8k_aug_nl",
    hub="whynlp/gsm8k-aug-nl",
    columns=("question", "steps", "answer"),
    parse=_parse,
    task_type="math_word_problem",
)

"""GSM8K-Aug (Deng et al. 2023, arXiv 2311.01460): GSM8K, augmented by GPT-4; each step is an equation.

On the hub in the form of PCCoT (arXiv 2506.18582), where `steps` is a list of equations with their brackets. The
columns are written from memory and were not checked against the hub. Copies may also be in the original text format,
`question||<<1+2=3>> <<3*4=12>> #### 12` (da03/Internalize_CoT_Step_by_Step).
"""

from __future__ import annotations

from data.families.base import Family, Question, Row, RowDroppedError, number_of, text_of


def parse_steps(row: Row, between: str) -> Question:
    """A row with `question`, `answer` and `steps`: a list, or one text.

    `between`: what joins the steps of a list.
    """
    question, steps, answer = text_of(row, "question"), row["steps"], number_of(row, "answer")
    reasoning = between.join(str(step).strip() for step in steps) if isinstance(steps, list) else str(steps or "")
    if not reasoning.strip():
        raise RowDroppedError("no steps")
    return Question(question, reasoning.strip(), answer)


def _parse(row: Row) -> Question:
    return parse_steps(row, " ")


FAMILY = Family(
    name="gsm8k_aug",
    hub="whynlp/gsm8k-aug",
    columns=("question", "steps", "answer"),
    parse=_parse,
    task_type="math_word_problem",
)

"""ARC-Challenge (Clark et al. 2018, arXiv 1803.05457): science questions with options, without reasoning."""

from __future__ import annotations

from string import ascii_uppercase

from data.families.base import Family, Question, Row, RowDroppedError, text_of


def _parse(row: Row) -> Question:
    stem, key = text_of(row, "question"), text_of(row, "answerKey")
    labels, options = row["choices"]["label"], row["choices"]["text"]
    if key not in labels or len(labels) != len(options):
        raise RowDroppedError("answerKey is not among the choices")
    # A few rows number their options instead of lettering them.
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    return Question(stem, "", ascii_uppercase[labels.index(key)], options="\n".join(lines))


FAMILY = Family(
    name="arc_challenge",
    hub="allenai/ai2_arc",
    configs=("ARC-Challenge",),
    columns=("question", "choices", "answerKey"),
    parse=_parse,
    task_type="multiple_choice",
)

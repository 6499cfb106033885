"""StrategyQA (Geva et al. 2021, arXiv 2101.02235): yes-or-no questions that need facts which they do not state."""

from __future__ import annotations

from data.families.base import Family, Question, Row, RowDroppedError, text_of


def _parse(row: Row) -> Question:
    question, answer = text_of(row, "question"), row["answer"]
    if not isinstance(answer, bool):
        raise RowDroppedError("answer is neither true nor false")
    return Question(question, _facts(row), "yes" if answer else "no")


def _facts(row: Row) -> str:
    """The facts as one text: a string on the hub, a list in the original file."""
    facts = row["facts"]
    return " ".join(str(fact).strip() for fact in facts) if isinstance(facts, list) else text_of(row, "facts")


FAMILY = Family(
    name="strategyqa",
    hub="ChilleD/StrategyQA",
    columns=("question", "answer", "facts"),
    parse=_parse,
    task_type="yes_no",
)

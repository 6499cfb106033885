r"""MATH (Hendrycks et al. 2021, arXiv 2103.03874): competition problems; the result is in the solution's `\boxed{}`."""

from __future__ import annotations

from data.families.base import Family, Question, Row, RowDroppedError, text_of
from data.latex import last_boxed


def _parse(row: Row) -> Question:
    problem, solution = text_of(row, "problem"), text_of(row, "solution")
    answer = last_boxed(solution)
    if answer is None:
        raise RowDroppedError("no \\boxed result in solution")
    return Question(problem, solution, answer)


FAMILY = Family(
    name="math",
    hub="EleutherAI/hendrycks_math",
    configs=(
        "algebra",
        "counting_and_probability",
        "geometry",
        "intermediate_algebra",
        "number_theory",
        "prealgebra",
        "precalculus",
    ),
    columns=("problem", "solution"),
    parse=_parse,
    task_type="competition_math",
)

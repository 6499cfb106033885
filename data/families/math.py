r"""MATH (Hendrycks et al. 2021, arXiv 2103.03874): competition problems; the result is in the solution's `\boxed{}`."""

from __future__ import annotations

import re

from data.families.base import Family, Question, Row, RowDroppedError, text_of

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
# Authors also write \boxed 7.
_BARE = re.compile(r"\s+([^\s$.,]+)")


def last_boxed(solution: str) -> str | None:
    r"""What stands in the last `\boxed{...}` or `\fbox{...}`, braces matched; None where there is none."""
    boxes = list(_BOX.finditer(solution))
    if not boxes:
        return None
    rest = solution[boxes[-1].end() :]
    if not rest.lstrip().startswith("{"):
        bare = _BARE.match(rest)
        return bare[1] if bare else None
    return _in_braces(rest.lstrip())


def _in_braces(text: str) -> str | None:
    depth = 0
    for place, character in enumerate(text):
        if character in "{}" and (place == 0 or text[place - 1] != "\\"):
            depth += 1 if character == "{" else -1
        if depth == 0:
            return text[1:place].strip() or None
    return None


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

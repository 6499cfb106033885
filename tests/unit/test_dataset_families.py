"""Tests of parsing rows of each dataset, in its original schema, into questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.families import FAMILIES, find_family
from data.families.base import Question, RowDroppedError
from data.latex import last_boxed
from kvcore.errors import FieldError
from tests.support.guide_data import MAKERS

FIXTURES = Path(__file__).parents[1] / "fixtures" / "datasets"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def questions(name: str) -> list[Question]:
    return [find_family(name).parse(row) for row in rows(name)]


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("gsm8k", ["6", "2000", "-5", "3.5", "54", "19", "13", "90", "16", "850", "50", "10"]),
        ("gsm8k_aug", ["35", "1999", "299", "2.5"]),
        ("gsm8k_aug_nl", ["35", "1999", "299", "2.5"]),
        ("svamp", ["58", "84", "5", "102", "12", "6", "40", "61", "308", "3.5", "768", "49"]),
        ("strategyqa", ["no", "no", "yes", "yes", "yes", "no", "yes", "no", "yes", "no", "no", "no"]),
        ("math23k", ["35", "90", "2/5", "90", "65", "40", "7.5", "94", "1(1/4)", "40%", "10", "300"]),
        ("arc_challenge", ["B", "C", "B", "A", "B", "B", "C", "B", "D", "B", "C", "A"]),
        (
            "hotpotqa",
            ["Port Lin", "Kest", "Marn", "Ossel", "Tarn", "Ulm Bay", "Vell", "Wex", "Yarrow", "Zell", "Arden", "no"],
        ),
        (
            "math",
            [
                "4",
                r"\frac{1}{2}",
                "6",
                "2",
                "5",
                r"\left\{-\sqrt{2}, \sqrt{2}\right\}",
                r"\dfrac{1}{2}",
                r"a\sqrt{2}",
                "55",
                r"\frac{1}{3}",
                "12",
                r"\begin{pmatrix} 0 & 1 \\ 1 & 0 \end{pmatrix}",
            ],
        ),
    ],
)
def test_rows_in_the_original_schema_are_parsed(name: str, answers: list[str]) -> None:
    assert [question.answer for question in questions(name)] == answers


def test_gsm8k_reasoning_has_no_calculator_annotations_or_result() -> None:
    assert questions("gsm8k")[0].reasoning == "She bakes 3*12=36 rolls.\nShe keeps 36-30=6 rolls."


@pytest.mark.parametrize(
    ("name", "reasoning"),
    [
        ("gsm8k_aug", "<<3*12=36>> <<36-1=35>>"),
        ("gsm8k_aug_nl", "The crates hold 36 apples.\nOf these, 35 are good."),
    ],
)
def test_gsm8k_aug_joins_its_steps_as_each_set_is_written(name: str, reasoning: str) -> None:
    row, parse = rows(name)[0], find_family(name).parse
    assert parse(row).reasoning == reasoning
    assert parse(row | {"steps": f" {reasoning} "}).reasoning == reasoning, "copies may have the steps as one text"


def test_svamp_question_joins_body_and_question_and_reasoning_is_the_equation() -> None:
    found = questions("svamp")
    assert found[0].stem.startswith("There are 87 oranges in a crate and 29 in a bowl. How many")
    assert [question.reasoning for question in found[:1] + found[4:6]] == [
        "87 - 29 = 58",
        "( ( 3 + 5 ) + 4 ) = 12",
        "1.5 * 4 = 6",
    ]


def test_strategyqa_facts_may_be_a_string_or_a_list() -> None:
    row = rows("strategyqa")[0]
    parse = find_family("strategyqa").parse
    assert parse(row).reasoning == "Penguins cannot fly. A roof is higher than a penguin can jump."
    assert parse(row | {"facts": ["One. ", "Two."]}).reasoning == "One. Two."


def test_math23k_reasoning_is_the_equation() -> None:
    assert questions("math23k")[3].reasoning == "x=150*(1-40%)=90"


def test_arc_options_are_lettered_and_reasoning_is_empty() -> None:
    numbered = questions("arc_challenge")[4]
    assert numbered.options == "A. metre\nB. newton\nC. kelvin\nD. second"
    assert numbered.reasoning == ""


def test_hotpotqa_keeps_supporting_paragraphs_and_reasoning_is_their_facts() -> None:
    first, last = questions("hotpotqa")[0], questions("hotpotqa")[-1]
    assert first.context == (
        "Blue Harbour: Blue Harbour is a novel by Ada Kern. It has twelve chapters.\n"
        "Ada Kern: Ada Kern is a writer. The writer was born in Port Lin."
    )
    assert first.reasoning == "Blue Harbour is a novel by Ada Kern. The writer was born in Port Lin."
    # The second fact of the last row is past the end of its paragraph.
    assert last.reasoning == "Hill Song was written by Mo Fenn, born in 1901."


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("gsm8k", {"answer": "It is 6."}, "no '#### result'"),
        ("gsm8k", {"question": " "}, "empty question"),
        ("gsm8k_aug", {"steps": []}, "no steps"),
        ("gsm8k_aug_nl", {"steps": None}, "no steps"),
        ("gsm8k_aug", {"answer": ""}, "empty answer"),
        ("svamp", {"Answer": None}, "empty Answer"),
        ("strategyqa", {"answer": "yes"}, "neither true nor false"),
        ("math23k", {"ans": ""}, "empty ans"),
        ("math", {"solution": "It is 4."}, "no .boxed result"),
        ("math", {"solution": "It is $\\boxed{4$."}, "no .boxed result"),
        ("arc_challenge", {"answerKey": "E"}, "not among the choices"),
        ("hotpotqa", {"supporting_facts": {"title": ["None"], "sent_id": [0]}}, "no supporting fact"),
    ],
)
def test_unusable_row_is_dropped_with_its_reason(name: str, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowDroppedError, match=reason):
        find_family(name).parse(rows(name)[0] | change)


@pytest.mark.parametrize(
    ("solution", "result"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed 7.", "7"),
        (r"\boxed {x}", "x"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{1,2\right.}", r"\left\{1,2\right."),
        (r"\boxed{}", None),
        (r"\boxedness{3}", None),
        ("plain", None),
    ],
)
def test_last_box_is_read_with_matched_braces(solution: str, result: str | None) -> None:
    assert last_boxed(solution) == result


def test_unknown_dataset_error_suggests_nearest_name() -> None:
    with pytest.raises(FieldError, match="did you mean 'gsm8k'"):
        find_family("gsm8")


@pytest.mark.parametrize("name", FAMILIES.builtin)
def test_generated_rows_have_the_original_columns_and_parse(name: str) -> None:
    family = find_family(name)
    made = [MAKERS[name](index) for index in range(50)]
    assert list(made[0]) == list(rows(name)[0])
    assert family.name == name
    assert set(family.columns) <= set(made[0])
    assert len({family.parse(row).stem for row in made}) == len(made)

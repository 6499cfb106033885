"""Tests of the question pool: deduplication, reasons for dropped rows, and splits that never divide a question."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.families import find_family
from data.prompts import STYLES, Style
from data.question_pool import PoolReader, QuestionPool, question_key
from data.records import Record
from kvcore.errors import ConfigError
from tests.support.guide_data import MAKERS

GSM8K = find_family("gsm8k")
WORKED = "2+3=5\n#### 5"


def read(*rows: dict[str, Any], styles: tuple[Style, ...] = STYLES, seed: int = 0) -> QuestionPool:
    return PoolReader(styles, seed).read(GSM8K, rows)


def gsm8k_rows(count: int) -> list[dict[str, Any]]:
    return [MAKERS["gsm8k"](index) for index in range(count)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How many are left?", "how many  are\nleft ?"),
        ("It costs 1.5 dollars. Why?", "It costs 1.5 dollars, why"),
        ("果园里有４８棵，为什么？", "果园里有48棵,为什么?"),
    ],
)
def test_variants_of_a_question_share_a_key(one: str, other: str) -> None:
    assert question_key(one) == question_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 3-5?", "What is 3+5?"),
        ("Half of 1.5?", "Half of 15?"),
        ("What is $f'(x)$?", "What is $f(x)$?"),
        ("5!", "5"),
        ("1:2", "12"),
    ],
)
def test_different_questions_have_different_keys(one: str, other: str) -> None:
    assert question_key(one) != question_key(other)


def test_question_gives_one_record_per_style() -> None:
    pool = read({"question": "What is 2+3?", "answer": WORKED})
    key = question_key("What is 2+3?")
    assert dict(pool.entries[0].records) == {
        "cot": Record(f"gsm8k-{key}-cot", "Question: What is 2+3?\nAnswer:", " 2+3=5\n####", " 5"),
        "direct": Record(f"gsm8k-{key}-direct", "Question: What is 2+3?\nGive only the result.\nAnswer:", "", " 5"),
    }


def test_question_without_reasoning_gives_no_cot_record() -> None:
    pool = read({"question": "What is 2+3?", "answer": "#### 5"})
    assert [style for style, _ in pool.entries[0].records] == ["direct"]
    assert pool.unreasoned == 1
    pool = read({"question": "What is 2+3?", "answer": "#### 5"}, styles=("cot",))
    assert (pool.entries, pool.dropped) == ([], {"no reasoning, and only style cot is requested": 1})


def test_duplicates_are_dropped_within_and_across_datasets() -> None:
    row = {"question": "Ben had 9 apples. He ate 2 of them. How many apples does Ben have now?", "answer": WORKED}
    reader = PoolReader(STYLES, 0)
    first = reader.read(GSM8K, [row, row])
    second = reader.read(find_family("svamp"), [MAKERS["svamp"](index) for index in range(3)])
    assert (len(first.entries), first.dropped) == (1, {"repeated in this dataset": 1})
    assert (len(second.entries), second.dropped) == (2, {"also in gsm8k": 1})
    assert reader.overlaps == {("gsm8k", "svamp"): 1}


def test_dropped_rows_are_counted_by_reason() -> None:
    pool = PoolReader(STYLES, 0, fits=lambda record: len(record.text) < 100).read(
        GSM8K,
        [
            {"question": "What is 2+3?", "answer": WORKED},
            {"question": "What is 2+3, and " * 20, "answer": WORKED},
            {"question": "half \ud800", "answer": WORKED},
            {"question": "What is 1+1?", "answer": "two"},
        ],
    )
    assert (pool.rows, len(pool.entries)) == (4, 1)
    assert pool.dropped == {
        "longer than max_tokens": 1,
        "unpaired surrogate": 1,
        "no '#### result' in answer": 1,
    }


def test_row_with_another_schema_raises() -> None:
    with pytest.raises(ConfigError, match=r"'arc_challenge': row 1 .*allenai/ai2_arc"):
        PoolReader(STYLES, 0).read(
            find_family("arc_challenge"), [{"question": "Why?", "choices": ["a", "b"], "answerKey": "A"}]
        )


def test_order_depends_only_on_texts_and_seed() -> None:
    keys = [[entry.key for entry in read(*rows, seed=seed).entries]
            for rows, seed in ((gsm8k_rows(50), 1), (gsm8k_rows(50)[::-1], 1), (gsm8k_rows(50), 2))]  # fmt: skip
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]
    assert sorted(keys[0]) == sorted(keys[2])


@given(reasoned=st.lists(st.booleans(), min_size=1, max_size=30), share=st.floats(0, 1), step=st.just(len(STYLES)))
def test_full_capacity_can_always_be_taken(reasoned: list[bool], share: float, step: int) -> None:
    pool = read(
        *({"question": f"Number {at}?", "answer": WORKED if worked else "#### 5"} for at, worked in enumerate(reasoned))
    )
    val = round(share * pool.capacity(step))
    train = pool.capacity(step) - val
    taken = pool.take(val * step, train * step)
    assert [sum(len(entry.records) for entry in part) for part in taken] == [val * step, train * step]
    first, second = ({entry.key for entry in part} for part in taken)
    assert not first & second

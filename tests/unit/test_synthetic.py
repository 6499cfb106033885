"""Tests of the chain arithmetic task: correct answers, disjoint splits, chance level and fillers."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.synthetic import FILLER, ChainTask, make_splits
from kvcore.errors import FieldError


def solve(prompt: str, modulus: int) -> list[int]:
    """Computes the running values from the prompt text, independent of the generator."""
    start, *steps = prompt.removesuffix(" =").split(" ")
    values = [int(start)]
    for step in steps:
        assert re.fullmatch(r"[-+x][1-9]\d*", step)
        expression = f"{values[-1]}{step}".replace("x", "*")
        values.append(eval(expression) % modulus)
    return values[1:]


@given(st.sampled_from([2, 3, 5, 7, 11]), st.integers(2, 6), st.data())
def test_reasoning_and_answer_are_the_running_values(modulus: int, operations: int, data: st.DataObject) -> None:
    task = ChainTask(modulus, operations)
    record = task.record(data.draw(st.integers(0, task.questions - 1)))
    values = solve(record.prompt, modulus)
    assert record.reasoning + record.answer == "".join(f" {value}" for value in values)
    assert record.answer == f" {values[-1]}"
    assert len(values) == operations


def test_questions_are_distinct_and_answers_equally_frequent() -> None:
    task = ChainTask(modulus=5, operations=2)
    records = [task.record(number) for number in range(task.questions)]
    assert len({record.prompt for record in records}) == len({record.id for record in records}) == task.questions
    counts = Counter(record.answer for record in records)
    assert set(counts.values()) == {task.questions * task.chance}


def test_documented_example_is_a_question() -> None:
    task = ChainTask(modulus=7, operations=2)
    by_prompt = {record.prompt: record for record in map(task.record, range(task.questions))}
    example = by_prompt["3 x4 -6 ="]
    assert (example.reasoning, example.answer) == (" 5", " 6")


def test_splits_are_disjoint_and_determined_by_the_seed() -> None:
    task = ChainTask()
    splits = make_splits(task, 3000, 200, 500, seed=1)
    prompts = [{record.prompt for record in part} for part in (splits.train, splits.val, splits.test)]
    assert [len(part) for part in prompts] == [3000, 200, 500]
    assert len(set.union(*prompts)) == 3700
    assert splits == make_splits(task, 3000, 200, 500, seed=1)
    assert splits != make_splits(task, 3000, 200, 500, seed=2)


def test_splits_can_use_all_questions() -> None:
    task = ChainTask(5, 2)
    every = make_splits(task, task.questions - 2, 1, 1, seed=0)
    assert len({record.id for record in every.train + every.val + every.test}) == task.questions


@pytest.mark.parametrize(
    ("modulus", "operations", "field"),
    [
        (1, 4, "modulus"),
        (9, 4, "modulus"),
        (101, 4, "modulus"),
        (-7, 4, "modulus"),
        (7, 1, "operations"),
        (7, 60, "operations"),
    ],
)
def test_invalid_task_is_refused(modulus: int, operations: int, field: str) -> None:
    with pytest.raises(FieldError) as caught:
        ChainTask(modulus, operations)
    assert caught.value.field == field


@pytest.mark.parametrize(("counts", "field"), [((0, 1, 1), "train"), ((1, 1, -1), "test"), ((200, 200, 200), "train")])
def test_impossible_splits_are_refused(counts: tuple[int, int, int], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        make_splits(ChainTask(3, 2), *counts, seed=0)
    assert caught.value.field == field


@given(st.integers(1, 5), st.data())
def test_fillers_only_add_words_to_the_reasoning(fillers: int, data: st.DataObject) -> None:
    plain, filled = ChainTask(), ChainTask(fillers=fillers)
    number = data.draw(st.integers(0, plain.questions - 1))
    without, record = plain.record(number), filled.record(number)
    assert (record.prompt, record.answer) == (without.prompt, without.answer)
    assert record.reasoning.replace(FILLER, "") == without.reasoning
    assert record.reasoning.count(FILLER) == fillers
    assert record == filled.record(number)


def test_filler_positions_are_uniform() -> None:
    task = ChainTask(fillers=3)
    words = [task.record(number).reasoning.split() for number in range(0, task.questions, 91)]
    shares = [sum(row[place] == FILLER.strip() for row in words) / len(words) for place in range(6)]
    assert all(0.47 < share < 0.53 for share in shares)


@pytest.mark.parametrize("fillers", [-1, 65])
def test_number_of_fillers_is_limited(fillers: int) -> None:
    with pytest.raises(FieldError, match="fillers"):
        ChainTask(fillers=fillers)


@given(st.sampled_from([3, 7, 11]), st.integers(2, 5), st.data())
def test_equations_lead_from_the_question_to_the_answer(modulus: int, operations: int, data: st.DataObject) -> None:
    task = ChainTask(modulus, operations, equations=True)
    record = task.record(data.draw(st.integers(0, task.questions - 1)))
    values = solve(record.prompt, modulus)
    start, *steps = record.prompt.removesuffix(" =").split(" ")
    lines = record.reasoning.splitlines(keepends=True)
    assert lines == [
        f" {before} {step[0]} {step[1:]} = {after}\n"
        for before, step, after in zip([int(start), *values], steps[:-1], values, strict=False)
    ]
    assert record.answer == f" {values[-1]}"


@given(st.integers(1, 5), st.data())
def test_distractors_only_add_operations_in_parentheses_to_the_question(count: int, data: st.DataObject) -> None:
    plain, distracted = ChainTask(), ChainTask(distractors=count)
    number = data.draw(st.integers(0, plain.questions - 1))
    without, record = plain.record(number), distracted.record(number)
    assert len(re.findall(r" \([-+x][1-6]\)", record.prompt)) == count
    assert re.sub(r" \([-+x][1-6]\)", "", record.prompt) == without.prompt
    assert (record.reasoning, record.answer) == (without.reasoning, without.answer)
    assert record == distracted.record(number)


def test_distractors_are_at_every_place_after_the_first_word() -> None:
    task = ChainTask(distractors=1)
    words = [task.record(number).prompt.split() for number in range(0, task.questions, 91)]
    places = Counter(next(place for place, word in enumerate(row) if word.startswith("(")) for row in words)
    assert set(places) == {1, 2, 3, 4, 5}
    assert all(0.15 < count / len(words) < 0.25 for count in places.values())


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"fillers": 1, "equations": True}, "fillers"),
        ({"distractors": -1}, "distractors"),
        ({"distractors": 17}, "distractors"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        ChainTask(**options)
    assert caught.value.field == field

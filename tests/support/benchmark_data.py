"""Synthetic questions for the benchmarks of the evaluation, each in the real schema of its dataset."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from tests.support.servers import REPOSITORY

Row = dict[str, Any]

LETTERS = "ABCD"
# Correct answers in BIG-Bench Hard for tasks without choices in brackets.
BBH_TARGETS = {
    "boolean_expressions": "False",
    "causal_judgement": "No",
    "dyck_languages": "] ] )",
    "formal_fallacies": "invalid",
    "multistep_arithmetic_two": "-12",
    "navigate": "Yes",
    "object_counting": "8",
    "sports_understanding": "yes",
    "web_of_lies": "No",
    "word_sorting": "alder birch cedar",
}


def write_benchmarks(directory: Path, per_dataset: int) -> None:
    """Write a copy of every benchmark to `directory`: NAME.jsonl, or NAME/SUBJECT.jsonl."""
    for name, make in MAKERS.items():
        _write(directory / f"{name}.jsonl", map(make, range(per_dataset)))
    for name, make_of in SUBJECT_MAKERS.items():
        for subject in subjects(name):
            _write(directory / name / f"{subject}.jsonl", (make_of(subject, index) for index in range(per_dataset)))


def subjects(name: str) -> list[str]:
    """The subjects of a benchmark with several subjects."""
    text = (REPOSITORY / "evaluation" / "tasks" / f"{name}.yaml").read_text(encoding="utf-8")
    return [task["task"] for task in yaml.safe_load(text.replace("!function ", ""))["task"]]


def gsm8k_test(index: int) -> Row:
    return {
        "question": f"Ada has {index + 1200} pens and buys {index + 34} more. How many has she?",
        "answer": f"She has {index + 1200}+{index + 34}=<<{index + 1200}+{index + 34}={2 * index + 1234}>>"
        f"{2 * index + 1234} pens.\n#### {2 * index + 1234:,}",
    }


def math500(index: int) -> Row:
    return {
        "problem": f"What is half of ${2 * index + 1}$?",
        "solution": f"It is $\\boxed{{\\frac{{{2 * index + 1}}}{{2}}}}$.",
        "answer": f"\\frac{{{2 * index + 1}}}{{2}}",
        "subject": "Prealgebra",
        "level": 1,
        "unique_id": f"test/prealgebra/{index}.json",
    }


def gsm_hard(index: int) -> Row:
    return {
        "input": f"Ada has {index} pens and gives {4000002.5 + index - 1} away, one cut in half. What is left?",
        "code": f"def solution():\n    return {index} - {4000002.5 + index - 1}\n",
        "target": -4000001.5,
    }


def multiarith(index: int) -> Row:
    return {"question": f" Ben had {index + 6} plums and ate {index + 1}. How many has he?", "final_ans": "5"}


def gpqa(index: int) -> Row:
    wrong = {f"Incorrect Answer {number}": f"{index + 10 * number} joules" for number in (1, 2, 3)}
    return {"Question": f"How much energy has body {index}?", "Correct Answer": f"{index} joules"} | wrong


def truthfulqa(index: int) -> Row:
    choices = ["It falls down.", "It flies away.", "It turns to gold."]
    return {
        "question": f"What happens to stone {index} when it is let go?",
        "mc1_targets": {"choices": choices, "labels": [1, 0, 0]},
        "mc2_targets": {"choices": choices, "labels": [1, 0, 0]},
    }


def bbh(subject: str, index: int) -> Row:
    return {"input": f"Question {index} of {subject}", "target": BBH_TARGETS.get(subject, "(B)")}


def cmmlu_subset(subject: str, index: int) -> Row:
    options = {letter: f"{index + place}个" for place, letter in enumerate(LETTERS)}
    return {"Question": f"{subject}的第{index}题，答案是几个？", **options, "Answer": LETTERS[index % 4]}


def ceval_subset(subject: str, index: int) -> Row:
    options = {letter: f"{index + place}个" for place, letter in enumerate(LETTERS)}
    asked = {"id": index, "question": f"{subject}的第{index}题是____。"}
    return asked | options | {"answer": LETTERS[index % 4], "explanation": ""}


MAKERS: dict[str, Callable[[int], Row]] = {
    "gsm8k_test": gsm8k_test,
    "math500": math500,
    "gsm_hard": gsm_hard,
    "multiarith": multiarith,
    "gpqa": gpqa,
    "truthfulqa": truthfulqa,
}
SUBJECT_MAKERS: dict[str, Callable[[str, int], Row]] = {
    "bbh": bbh,
    "cmmlu_subset": cmmlu_subset,
    "ceval_subset": ceval_subset,
}


def _write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")

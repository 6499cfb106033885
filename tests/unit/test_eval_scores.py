"""Tests of evaluation results: scores in percent, confidence intervals and non-finite values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.scores import bootstrap_interval, dataset_entry, question_lines, write_lines
from evaluation.scoring import NO_ANSWER
from kvcore.errors import ConfigError, KVDistillError


def generated(doc_id: int, score: float, answer: str = "4") -> dict[str, Any]:
    return {
        "doc_id": doc_id,
        "arguments": [("Question: 2+2?\nAnswer:", {"until": []})],
        "resps": [["The answer is 4"]],
        "filtered_resps": [answer],
        "filter": "answer",
        "target": "4",
        "exact_match": score,
    }


def multiple_choice(*likelihoods: float) -> dict[str, Any]:
    return {
        "doc_id": 0,
        "arguments": [("Q:", f" {letter}") for letter in "ABCD"[: len(likelihoods)]],
        "resps": [[(value, False)] for value in likelihoods],
        "filtered_resps": [(value, False) for value in likelihoods],
        "filter": "none",
        "target": 1,
        "acc": 1.0,
    }


def test_interval_contains_the_mean() -> None:
    values = [1.0] * 70 + [0.0] * 30
    low, high = bootstrap_interval(values)
    error = 1.96 * (0.7 * 0.3 / 100) ** 0.5
    assert (low, high) == pytest.approx((0.7 - error, 0.7 + error), abs=0.015)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    narrow = bootstrap_interval(values * 25)
    assert narrow[1] - narrow[0] == pytest.approx((high - low) / 5, rel=0.1)


def test_interval_has_nominal_coverage() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        low, high = bootstrap_interval((generator.random(80) < 0.4).astype(float).tolist(), resamples=500)
        covered += low <= 0.4 <= high
    assert 88 <= covered <= 100


def test_entry_has_the_documented_keys() -> None:
    samples = {"gsm8k_test": [generated(0, 1.0), generated(1, 0.0, NO_ANSWER), generated(2, 1.0), generated(3, 1.0)]}
    entry = dataset_entry("gsm8k_test", "exact_match", question_lines(samples, "exact_match", "answer"))
    assert entry["dataset"] == "gsm8k_test"
    assert entry["metric"] == "exact_match"
    assert entry["score"] == 75.0
    assert entry["num_examples"] == 4
    assert entry["no_answer"] == 1
    assert entry["ci95"] == pytest.approx([30.06, 95.44], abs=0.01), "Wilson's interval of 3 of 4"
    assert "subjects" not in entry


def test_unfinished_answers_are_a_share() -> None:
    lines = question_lines({"t": [generated(index, 1.0) for index in range(4)]}, "exact_match", "answer")
    for line, finished in zip(lines, (True, False, True, True), strict=True):
        line["finished"] = finished
    assert dataset_entry("t", "exact_match", lines)["unfinished_answers"] == 0.25
    chosen = question_lines({"t": [multiple_choice(-3.0, -1.5)]}, "acc", "none")
    assert dataset_entry("t", "acc", chosen)["unfinished_answers"] == 0.0


def test_subjects_are_reported_and_questions_weighted_equally() -> None:
    samples = {"bbh::navigate": [generated(0, 1.0)], "bbh::snarks": [generated(0, 0.0), generated(1, 0.0)]}
    entry = dataset_entry("bbh", "exact_match", question_lines(samples, "exact_match", "answer"))
    assert entry["score"] == pytest.approx(100 / 3)
    assert entry["subjects"] == {
        "navigate": {"score": 100.0, "num_examples": 1},
        "snarks": {"score": 0.0, "num_examples": 2},
    }


def test_each_question_has_a_line(tmp_path: Path) -> None:
    lines = question_lines({"t": [generated(0, 1.0), generated(1, 0.0)]}, "exact_match", "answer")
    write_lines(tmp_path / "new" / "t.jsonl", lines)
    first, _ = [json.loads(line) for line in (tmp_path / "new" / "t.jsonl").read_text(encoding="utf-8").splitlines()]
    assert first == {
        "task": "t",
        "id": 0,
        "prompt": "Question: 2+2?\nAnswer:",
        "output": "The answer is 4",
        "answer": "4",
        "target": "4",
        "score": 1.0,
    }


def test_multiple_choice_line_has_likelihoods_of_choices() -> None:
    (line,) = question_lines({"t": [multiple_choice(-3.0, -1.5)]}, "acc", "none")
    assert line["answer"] == " B"
    assert line["choices"] == [{"text": " A", "loglikelihood": -3.0}, {"text": " B", "loglikelihood": -1.5}]


def test_other_filters_are_ignored() -> None:
    strict = generated(0, 0.0) | {"filter": "strict-match"}
    (line,) = question_lines({"t": [generated(0, 1.0), strict]}, "exact_match", "answer")
    assert line["score"] == 1.0


def test_non_finite_likelihoods_raise() -> None:
    # argmax over NaN returns the first choice, which is the correct one in TruthfulQA.
    for bad in (float("nan"), float("-inf")):
        with pytest.raises(KVDistillError, match="question 0 are not finite"):
            question_lines({"truthfulqa": [multiple_choice(bad, bad)]}, "acc", "none")


def test_scores_above_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs 0 to 1"):
        question_lines({"t": [generated(0, 17.0)]}, "exact_match", "answer")

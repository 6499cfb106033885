"""Functions that the YAML files in evaluation/tasks call: document preparation, answer extraction and scores."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset
from lm_eval.api.filter import Filter

from evaluation import answers
from evaluation.number_text import parse_number
from kvcore.errors import FieldError

NO_ANSWER = "[no answer]"
Doc = Mapping[str, Any]

_EXTRACT: dict[str, Callable[..., str | None]] = {
    "number": answers.extract_number,
    "choice": answers.extract_choice,
    "label": answers.extract_label,
    "math": answers.extract_math,
    "words": answers.extract_words,
    "brackets": answers.extract_brackets,
}
_SAME: dict[str, Callable[[str, str], bool]] = {"number": answers.same_number, "math": answers.same_math}


class AnswerFilter(Filter):
    """Replaces each generated text with its extracted answer, or `[no answer]`.

    Args:
        kind: kind of answer: number, choice, label, math, words or brackets.
        options: further arguments of the extractor; the text of choices comes from each document.
    """

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self._kind, self._options = kind, options

    def apply(self, resps: Iterable[Sequence[str]], docs: Sequence[Doc]) -> list[list[str]]:
        """Returns one list of answers per document."""
        return [[self._answer(text, doc) for text in texts] for texts, doc in zip(resps, docs, strict=True)]

    def _answer(self, text: str, doc: Doc) -> str:
        options = dict(self._options)
        if self._kind == "choice" and "choices" in doc:
            options["choices"] = doc["choices"]
        return _EXTRACT[self._kind](text, **options) or NO_ANSWER


def score(doc: Doc, results: Sequence[str], kind: str = "text") -> dict[str, float]:
    """Compares an extracted answer with the document's `gold`, as a number, an expression or text."""
    answer, gold = results[0], str(doc["gold"])
    if answer == NO_ANSWER:
        return {"exact_match": 0.0}
    same = _SAME.get(kind)
    return {"exact_match": float(same(answer, gold) if same else answer.casefold() == gold.casefold())}


score_number = partial(score, kind="number")
score_math = partial(score, kind="math")


def gsm8k_docs(rows: Dataset) -> Dataset:
    """GSM8K: the result follows `####`."""
    return rows.map(_gsm8k_doc)


def _gsm8k_doc(row: Doc) -> dict[str, Any]:
    return {"gold": _number("gsm8k_test", row["question"], row["answer"].rpartition("####")[2].strip())}


def gsm_hard_docs(rows: Dataset) -> Dataset:
    """GSM-Hard: the result is a number in the column `target`."""
    return rows.map(lambda row: {"gold": _number("gsm_hard", row["input"], row["target"])})


def multiarith_docs(rows: Dataset) -> Dataset:
    """MultiArith: the result is the column `final_ans`."""
    return rows.map(lambda row: {"gold": _number("multiarith", row["question"], row["final_ans"])})


def _number(dataset: str, question: str, value: Any) -> str:
    """The result as text. Checked here, since scoring happens only after all questions are answered."""
    gold = str(value).strip()
    if parse_number(gold) is None:
        raise FieldError(dataset, f"the answer of '{question:.60}' is not a number: '{gold:.60}'")
    return gold


def math500_docs(rows: Dataset) -> Dataset:
    """MATH-500: the answer has its own column."""
    return rows.map(lambda row: {"gold": row["answer"]})


def bbh_docs(rows: Dataset) -> Dataset:
    """BIG-Bench Hard: choices are written `(A)`."""
    return rows.map(lambda row: {"gold": " ".join(row["target"].strip("() ").split()) or row["target"]})


def bracket_docs(rows: Dataset) -> Dataset:
    """BIG-Bench Hard's Dyck languages: the target is brackets."""
    return rows.map(lambda row: {"gold": " ".join(row["target"].split())})


def gpqa_docs(rows: Dataset) -> Dataset:
    """GPQA: four options in an order that depends only on the question, so that all runs ask the same."""
    return rows.map(_gpqa_doc)


def _gpqa_doc(row: Doc) -> dict[str, Any]:
    options = [_clean(row[f"Incorrect Answer {number}"]) for number in (1, 2, 3)]
    right = _clean(row["Correct Answer"])
    seed = hashlib.blake2b(row["Question"].encode(), digest_size=8).digest()
    options.append(right)
    random.Random(seed).shuffle(options)
    return {"question": _clean(row["Question"]), "choices": options, "gold": "ABCD"[options.index(right)]}


def _clean(text: str | None) -> str:
    if text is None or not text.strip():
        raise FieldError("gpqa", "a question or an option is empty")
    return " ".join(text.replace(" [title]", ". ").split(" ")).strip()

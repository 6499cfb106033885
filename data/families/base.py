"""The dataset family: where its questions come from, and how a row is parsed into a question."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a dataset.

    Questions with the same `stem` are equal. `context` is text before the question. `options` are its possible answers,
    one per line. `reasoning` is empty if the dataset has none.
    """

    stem: str
    reasoning: str
    answer: str
    context: str = ""
    options: str = ""


class RowDroppedError(Exception):
    """A row cannot be used; the message is the reason that the report counts."""


@dataclass(frozen=True, slots=True)
class Family:
    """One dataset.

    Args:
        name: the name that users write.
        hub: its id on the Hugging Face hub; None if only local copies exist.
        columns: the columns that `parse` needs.
        parse: converts a row to a question, or raises RowDroppedError.
        task_type: the kind of question.
        language: ISO 639-1 code of the questions.
        configs: configurations on the hub to read, in order; the default one if empty.
        split: the split to read; the others are for evaluation.
        large: whether to read a shuffled sample of the rows instead of all.
    """

    name: str
    hub: str | None
    columns: tuple[str, ...]
    parse: Callable[[Row], Question]
    task_type: str
    language: str = "en"
    configs: tuple[str, ...] = ()
    split: str = "train"
    large: bool = False

    @property
    def origin(self) -> str:
        """The hub id with its configurations, for messages."""
        if self.hub is None:
            return "no hub id, local copies only"
        return f"{self.hub} ({', '.join(self.configs)})" if self.configs else self.hub


def text_of(row: Row, column: str) -> str:
    """The column's text without surrounding whitespace.

    Raises:
        RowDroppedError: the value is empty or not a string.
    """
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise RowDroppedError(f"empty {column}")
    return value.strip()


def number_of(row: Row, column: str) -> str:
    """The column's number as text, without thousands separators and without a trailing `.0`.

    Raises:
        RowDroppedError: the value is empty or neither a number nor a string.
    """
    value = row[column]
    plain = str(value) if isinstance(value, int | float) else text_of(row, column).replace(",", "")
    return plain.removesuffix(".0")

"""What a dataset family is: where its questions come from, and how one row of it becomes a question."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a dataset.

    Two with the same `stem` are the same question. `context` is what is read before it and `options` what it can be
    answered with, a line each. `reasoning` is empty where the dataset has none.
    """

    stem: str
    reasoning: str
    answer: str
    context: str = ""
    options: str = ""


class RowDroppedError(Exception):
    """This row makes no question; the message is the reason under which it is counted."""


@dataclass(frozen=True, slots=True)
class Family:
    """One dataset.

    Args:
        name: as users write it.
        hub: its id on the Hugging Face hub; None: only local copies.
        columns: those that `parse` reads; a copy without them is refused.
        parse: makes a question of a row, or raises RowDroppedError.
        task_type: what kind of question it asks.
        language: of the questions, as ISO 639-1 writes it.
        configs: the hub's configurations to read, one after the other; none: the default.
        split: the only split that is read, as the others are for evaluation.
        large: read a shuffled part of it as a stream instead of the whole.
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
        """The hub's id with the configurations, for people."""
        if self.hub is None:
            return "no hub id, local copies only"
        return f"{self.hub} ({', '.join(self.configs)})" if self.configs else self.hub


def text_of(row: Row, column: str) -> str:
    """The column's text without blanks at its ends.

    Raises:
        RowDroppedError: it is empty or no text.
    """
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise RowDroppedError(f"empty {column}")
    return value.strip()


def number_of(row: Row, column: str) -> str:
    """The column's number as text: without thousands separators, and without `.0` where it is whole.

    Raises:
        RowDroppedError: it is empty or neither number nor text.
    """
    value = row[column]
    plain = str(value) if isinstance(value, int | float) else text_of(row, column).replace(",", "")
    return plain.removesuffix(".0")

"""Chain arithmetic: a start value and a few operations modulo a small prime, written as text.

`3 +4 x2 -5 +1 =` has the running values 0 0 2 3 modulo 7: the last is the answer, the others are the reasoning.
Every operation is a bijection, so all answers are equally likely and guessing scores 1 / modulus.
With fillers the reasoning also has meaningless words at random positions: ` 0 so so 0 2 so`. A selector whose budget is
the number of values then has to find the values.

With equations the reasoning has a line for each value: ` 3 + 4 = 0`, ` 0 x 2 = 0`, ` 0 - 5 = 2`. With distractors the
question also has operations in parentheses, which do not count: `3 +4 (x6) x2 -5 +1 =`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data.records import Record
from kvcore.errors import FieldError

OPERATORS = ("+", "-", "x")
FILLER = " so"
_MAX_MODULUS = 97
_MAX_QUESTIONS = 2**62
_MAX_FILLERS = 64
_MAX_DISTRACTORS = 16


@dataclass(frozen=True, slots=True)
class ChainTask:
    """A task: questions with `operations` steps and operands from 1 to `modulus` - 1.

    Attributes:
        modulus: a prime from 2 to 97.
        operations: of each question.
        fillers: meaningless words in each reasoning.
        equations: whether the reasoning has equations instead of values alone.
        distractors: operations in each question that do not count.

    Raises:
        FieldError: the modulus is not a prime from 2 to 97, the number of operations is below 2 or gives too many
            questions to number, the fillers are not from 0 to 64 or are combined with equations, or the distractors
            are not from 0 to 16.
    """

    modulus: int = 7
    operations: int = 4
    fillers: int = 0
    equations: bool = False
    distractors: int = 0

    def __post_init__(self) -> None:
        prime = self.modulus >= 2 and all(self.modulus % divisor for divisor in range(2, self.modulus))
        if not prime or self.modulus > _MAX_MODULUS:
            raise FieldError("modulus", f"{self.modulus} is not a prime from 2 to {_MAX_MODULUS}")
        if self.operations < 2:
            raise FieldError("operations", f"{self.operations} leaves no reasoning before the answer; the minimum is 2")
        if self.questions > _MAX_QUESTIONS:
            raise FieldError("operations", f"{self.operations} gives more than {_MAX_QUESTIONS} questions")
        if not 0 <= self.fillers <= _MAX_FILLERS:
            raise FieldError("fillers", f"{self.fillers} is not from 0 to {_MAX_FILLERS}")
        if self.fillers and self.equations:
            raise FieldError("fillers", f"{self.fillers} fillers need reasoning of values; equations have none")
        if not 0 <= self.distractors <= _MAX_DISTRACTORS:
            raise FieldError("distractors", f"{self.distractors} is not from 0 to {_MAX_DISTRACTORS}")

    @property
    def questions(self) -> int:
        """Number of different questions."""
        return self.modulus * self._choices**self.operations

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return 1.0 / self.modulus

    def record(self, question: int) -> Record:
        """The question with this number, from 0 to `questions` - 1, with its reasoning and answer."""
        assert 0 <= question < self.questions
        rest, value = divmod(question, self.modulus)
        prompt, values, equations = [str(value)], [], []
        for _ in range(self.operations):
            rest, choice = divmod(rest, self._choices)
            operator, operand = self._operation(choice)
            before, value = value, _apply(operator, value, operand) % self.modulus
            prompt.append(f"{operator}{operand}")
            values.append(f" {value}")
            equations.append(f" {before} {operator} {operand} = {value}\n")
        text = " ".join(self._distracted(question, prompt)) + " ="
        reasoning = "".join(equations[:-1]) if self.equations else self._with_fillers(question, values[:-1])
        return Record(f"chain{self.modulus}-{question}", text, reasoning, values[-1])

    def _operation(self, choice: int) -> tuple[str, int]:
        return OPERATORS[choice % len(OPERATORS)], choice // len(OPERATORS) + 1

    def _distracted(self, question: int, prompt: Sequence[str]) -> list[str]:
        """The words of the prompt, with distractors at random positions after the first that depend on the question."""
        words = list(prompt)
        # Another stream of random numbers than that of the fillers.
        generator = np.random.default_rng((question, 1))
        for choice in generator.integers(self._choices, size=self.distractors).tolist():
            operator, operand = self._operation(choice)
            words.insert(int(generator.integers(1, len(words) + 1)), f"({operator}{operand})")
        return words

    def _with_fillers(self, question: int, values: Sequence[str]) -> str:
        """The values in order, with fillers at random positions that depend on the question."""
        count = len(values) + self.fillers
        kept = np.random.default_rng(question).choice(count, size=len(values), replace=False)
        words = [FILLER] * count
        for position, value in zip(sorted(kept.tolist()), values, strict=True):
            words[position] = value
        return "".join(words)

    @property
    def _choices(self) -> int:
        return len(OPERATORS) * (self.modulus - 1)


@dataclass(frozen=True, slots=True)
class Splits:
    """Disjoint training, validation and test records."""

    train: list[Record]
    val: list[Record]
    test: list[Record]


def make_splits(task: ChainTask, train: int, val: int, test: int, seed: int) -> Splits:
    """Draws questions without replacement; deterministic for equal arguments.

    Raises:
        FieldError: a count is below 1, or the total exceeds the number of questions.
    """
    for name, count in (("train", train), ("val", val), ("test", test)):
        if count < 1:
            raise FieldError(name, f"{count} is too small; the minimum is 1 record")
    total = train + val + test
    if total > task.questions:
        raise FieldError("train", f"{total} records in total, but there are only {task.questions} different questions")
    generator = np.random.default_rng(seed % 2**64)
    drawn: list[int] = generator.choice(task.questions, size=total, replace=False).tolist()
    test_end = test + val
    return Splits(_records(task, drawn[test_end:]), _records(task, drawn[test:test_end]), _records(task, drawn[:test]))


def _records(task: ChainTask, questions: Iterable[int]) -> list[Record]:
    return [task.record(question) for question in questions]


def _apply(operator: str, value: int, operand: int) -> int:
    match operator:
        case "+":
            return value + operand
        case "-":
            return value - operand
        case _:
            return value * operand

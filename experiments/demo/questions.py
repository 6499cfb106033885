"""Accuracy and cost of the demo's student at inference: with latents, and with reasoning that it writes."""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.records import Record
from kvdistill.generation_settings import LoadingSettings

if TYPE_CHECKING:
    from kvdistill.student import Student

WRITTEN = "written reasoning"
_SHOWN = 3
_TIMED = 20
_BATCH = 250
# An answer and its end.
_ANSWER_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Asked:
    """One test item, answered after latents, and after reasoning that the same weights write.

    `latent_passes`, `written_passes`: forward passes of the model, counted.
    """

    question: str
    reference: str
    latent: str
    latent_passes: int
    written: str
    written_passes: int


@dataclass(frozen=True, slots=True)
class Way:
    """A way to answer: its accuracy on the test items, and the median milliseconds of one question alone."""

    name: str
    accuracy: float
    milliseconds: float


@dataclass(frozen=True, slots=True)
class Inference:
    """A trained student's answers and what they cost. `model`: its directory."""

    model: Path
    asked: list[Asked]
    ways: list[Way]

    def as_json(self) -> dict[str, Any]:
        """The entry of report.json."""
        return {
            "forward_passes": {
                "latents": [one.latent_passes for one in self.asked],
                WRITTEN: [one.written_passes for one in self.asked],
            },
            "accuracy": {way.name: way.accuracy for way in self.ways},
            "milliseconds": {way.name: way.milliseconds for way in self.ways},
        }

    def sentences(self) -> list[str]:
        """What the figures say."""
        latent = statistics.mean(one.latent_passes for one in self.asked)
        written = statistics.mean(one.written_passes for one in self.asked)
        cost = (
            f"After its latents the student took {latent:.0f} forward passes per question (prompt, latent passes, "
            f"answer and end), and {written:.0f} when the same weights wrote the reasoning first."
        )
        meaning = (
            "The reasoning of this toy task has only a few tokens, so latents save nothing here. Written reasoning "
            "takes a forward pass for each token, and real reasoning is longer: about 70 tokens in GSM8K. The number "
            "of latent passes does not grow with it."
        )
        return [cost, meaning]


def measure_inference(model: Path, test: Sequence[Record], reasoning_tokens: int) -> Inference:
    """Answers test items in all ways.

    Args:
        model: the directory of a latent student.
        test: held-out records.
        reasoning_tokens: of each record.
    """
    # These imports are slow, and the demo needs them last.
    from kvdistill.student import Student, load_student  # noqa: PLC0415
    from student_trainer.model.prompt_format import PLAIN  # noqa: PLC0415

    student = load_student(model, device="cpu")
    writing = _Arm(WRITTEN, Student(student.lm, student.tokenizer, None, PLAIN), reasoning_tokens + _ANSWER_TOKENS, {})
    thinking = [
        _Arm(f"{passes} latent {'pass' if passes == 1 else 'passes'}", student, _ANSWER_TOKENS, {"passes": passes})
        for passes in range(1, student.passes + 1)
    ]
    asked = [
        Asked(record.prompt, record.answer, *_counted(thinking[-1], record), *_counted(writing, record))
        for record in test[:_SHOWN]
    ]
    arms = [*thinking, writing]
    milliseconds = _milliseconds(arms, test[:_TIMED])
    return Inference(model, asked, [Way(arm.name, _accuracy(arm, test), milliseconds[arm.name]) for arm in arms])


def ask(inference: Inference) -> None:
    """Answers the shown questions as `kvdistill generate` does, and prints what that took."""
    from kvdistill.ask import generate  # noqa: PLC0415 - slow

    questions = [one.question for one in inference.asked]
    print(f"\n$ {shlex.join(['kvdistill', 'generate', str(inference.model), *questions])}", flush=True)
    generate(str(inference.model), LoadingSettings(device="cpu"), questions, {})
    print("\n" + "\n".join(inference.sentences()))


@dataclass(frozen=True, slots=True)
class _Arm:
    """A way to answer: its name, the model, the maximum number of new tokens, and further settings of generation."""

    name: str
    student: Student
    tokens: int
    settings: dict[str, Any]

    def generate(self, questions: Sequence[str]) -> list[str]:
        return self.student.generate(questions, self.tokens, batch_size=_BATCH, **self.settings)


def _accuracy(arm: _Arm, test: Sequence[Record]) -> float:
    from student_trainer.loop.greedy_answers import is_correct  # noqa: PLC0415 - slow

    texts = arm.generate([record.prompt for record in test])
    pairs = zip(texts, test, strict=True)
    return sum(is_correct(text, record, latent=arm.name != WRITTEN) for text, record in pairs) / len(test)


def _counted(arm: _Arm, record: Record) -> tuple[str, int]:
    """The answer, and how many forward passes of the model it took."""
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    hook = arm.student.lm.base_model.register_forward_hook(count)
    try:
        (text,) = arm.generate([record.prompt])
    finally:
        hook.remove()
    return text, passes


def _milliseconds(arms: Sequence[_Arm], records: Sequence[Record]) -> dict[str, float]:
    """The median time of one question in each way; the ways take turns, so that other programs slow all of them."""
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for record in records:
        for arm in arms:
            began = time.perf_counter()
            arm.generate([record.prompt])
            times[arm.name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}

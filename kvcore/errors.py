"""The errors that users meet. Everything else that is raised is a bug."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class KVDistillError(Exception):
    """Root of every error that kvdistill raises on purpose.

    `next_step`: what to do next, where the message itself does not say.
    """

    next_step: ClassVar[str] = ""

    def line(self) -> str:
        """The error in one line, with what to do next: what commands end with."""
        return f"{self}; next: {self.next_step}" if self.next_step else str(self)


class ConfigError(KVDistillError, ValueError):
    """A configuration, a flag or a plan holds a value that cannot be used."""


class FieldError(ConfigError):
    """One named field is wrong.

    Args:
        field: dotted path of the field, as the user wrote it.
        problem: what is wrong, with the value and the limit.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class UnsupportedModelError(KVDistillError):
    """The model's architecture is not one whose keys and values can be read exactly."""


class ProtocolError(KVDistillError):
    """The other side sent bytes that break the protocol: truncated, reordered, or failing their hash."""

    next_step = "compare the versions on both sides (kvdistill --version), and look for a proxy that alters messages"


class StoreError(KVDistillError):
    """A KV store is missing, damaged, or was written for another plan or teacher."""

    next_step = "kvdistill inspect DIRECTORY shows what a store holds"


class TeacherError(KVDistillError):
    """A teacher could not serve.

    Args:
        teacher: the teacher's name in the configuration.
        problem: what happened and what to do next.
    """

    def __init__(self, teacher: str, problem: str) -> None:
        super().__init__(f"teacher '{teacher}': {problem}")
        self.teacher = teacher
        self.problem = problem


class TeacherUnavailableError(TeacherError):
    """No endpoint of the teacher answers."""

    next_step = "kvdistill doctor --teacher HOST:PORT says what answers there"


class TeacherRefusedError(TeacherError):
    """The teacher answered that it will not serve this request: retrying cannot help."""

    next_step = "kvdistill inspect HOST:PORT shows what the teacher offers"


class TeacherMismatchError(TeacherError):
    """An endpoint serves other weights, tokenizer or geometry than its replicas did before."""

    next_step = "kvdistill inspect HOST:PORT of each endpoint shows in what they differ"


class NonFiniteError(KVDistillError):
    """A teacher's keys, values or scores are NaN, infinite, or beyond what the codec can hold.

    Args:
        what: what was not finite.
        finite: for each batch item whether it was, so that only the samples at fault fail (`rows`).
    """

    next_step = "serve the teacher with --dtype fp32 or bf16"

    def __init__(self, what: str, finite: Sequence[bool]) -> None:
        self.rows = [row for row, good in enumerate(finite) if not good]
        super().__init__(f"{what} is not finite, in batch items {self.rows}; a model in half precision may overflow")

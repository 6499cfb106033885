"""The errors that users can meet. Any other exception is a bug."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import ClassVar

EXIT_FAILED = 1
EXIT_USAGE = 2


class KVDistillError(Exception):
    """Base class of all errors that kvdistill raises on purpose.

    `next_step`: what the user can do next, if the message itself does not say so. `exit_status`: of a command that
    ends with this error.
    """

    next_step: ClassVar[str] = ""
    exit_status: ClassVar[int] = EXIT_FAILED

    def line(self) -> str:
        """The message and the next step in one line, as commands print it before they exit."""
        return f"{self}; next: {self.next_step}" if self.next_step else str(self)


class ConfigError(KVDistillError, ValueError):
    """A configuration, a flag or a plan has an invalid value."""

    exit_status = EXIT_USAGE


class FieldError(ConfigError):
    """One field has an invalid value.

    Args:
        field: dotted path of the field, as the user writes it.
        problem: the value, the limit, and what is wrong.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class UnsupportedModelError(KVDistillError):
    """The keys and values of this model architecture cannot be read exactly."""


class ProtocolError(KVDistillError):
    """The other side broke the protocol: bytes were truncated, reordered or damaged."""

    next_step = "compare the versions on both sides (kvdistill --version), and look for a proxy that alters messages"


class OutputError(KVDistillError):
    """A file could not be written."""

    next_step = "free space on that disk, or check the permissions there, then run the same command again"


class StoreError(KVDistillError):
    """A KV store is missing, damaged, or belongs to another plan or teacher."""

    next_step = "kvdistill inspect DIRECTORY shows what a store holds"


class TeacherError(KVDistillError):
    """A teacher could not serve a request.

    Args:
        teacher: the teacher's name in the configuration.
        problem: what happened and what to do next.
    """

    def __init__(self, teacher: str, problem: str) -> None:
        super().__init__(f"teacher '{teacher}': {problem}")
        self.teacher = teacher
        self.problem = problem


class TeacherUnavailableError(TeacherError):
    """None of the teacher's endpoints answers."""

    next_step = "kvdistill doctor --teacher HOST:PORT checks an endpoint"


class TeacherBusyError(TeacherUnavailableError):
    """The queue of an endpoint is full.

    Args:
        teacher: the teacher's name in the configuration.
        problem: what the endpoint said.
        wait_s: the delay before a retry that it asks for.
    """

    def __init__(self, teacher: str, problem: str, wait_s: float = 0.0) -> None:
        super().__init__(teacher, problem)
        self.wait_s = wait_s


class TeacherRefusedError(TeacherError):
    """The teacher refused the request; a retry would be refused too."""

    next_step = "kvdistill inspect HOST:PORT shows what the teacher offers"


class EndpointRefusedError(TeacherRefusedError):
    """One endpoint is another service, or does not accept this caller; another replica of the teacher may serve it."""


class TeacherMismatchError(TeacherError):
    """An endpoint serves other weights, tokenizer, geometry or K/V than the teacher's other replicas."""

    next_step = "compare the endpoints with kvdistill inspect HOST:PORT"


class NonFiniteError(KVDistillError):
    """A teacher's keys, values or scores are NaN, infinite, or too large for the codec.

    Args:
        what: the quantity that is not finite.
        finite: whether each batch item is finite; the others are listed in `rows`, and only their samples fail.
    """

    next_step = "serve the teacher with --dtype fp32 or bf16"

    def __init__(self, what: str, finite: Sequence[bool]) -> None:
        self.rows = [row for row, good in enumerate(finite) if not good]
        super().__init__(f"{what} is not finite in batch items {self.rows}; fp16 may overflow")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""

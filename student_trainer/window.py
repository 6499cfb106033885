"""Sums between two logged steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from student_trainer.kv_batch import Received

SUMS = (
    "micro_batches",
    "samples",
    "seconds",
    "stall_s",
    "received",
    "missing",
    "encoded_bytes",
    "raw_bytes",
    "teacher_tokens",
)


@dataclass(slots=True)
class Window:
    """What one rank did. `received`, `missing`, bytes and tokens count per teacher; `samples` counts all ranks'."""

    micro_batches: int = 0
    samples: int = 0
    seconds: float = 0.0
    stall_s: float = 0.0
    received: int = 0
    missing: int = 0
    encoded_bytes: int = 0
    raw_bytes: int = 0
    teacher_tokens: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)

    def receive(self, received: Received, waited_s: float, decode_s: float) -> None:
        """Adds what one teacher sent for one micro-batch, and how long this rank waited for it."""
        self.stall_s += waited_s
        self.received += received.samples
        self.missing += received.missing
        self.encoded_bytes += received.encoded_bytes
        self.raw_bytes += received.raw_bf16_bytes
        self.teacher_tokens += received.teacher_tokens
        _add(self.stages, {**received.seconds, "decode": decode_s, "stall": waited_s})

    def add(self, other: Window) -> None:
        """Adds another window's sums."""
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        _add(self.losses, other.losses)
        _add(self.stages, other.stages)


def _add(mine: dict[str, float], theirs: Mapping[str, float]) -> None:
    for name, value in theirs.items():
        mine[name] = mine.get(name, 0.0) + value

"""Sums between two logged steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from student_trainer.kv_sources.kv_batch import DecodedBatch

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
# At the teacher and on the way; then what the trainer does with the answer.
TEACHER_STAGES = ("queue", "prefill", "encode", "network")
STAGES = (*TEACHER_STAGES, "decode", "stall")


@dataclass(frozen=True, slots=True)
class TeacherSums:
    """What one teacher sent: samples with and without K/V, bytes of encoded K/V, and seconds by stage."""

    samples: float = 0.0
    missing: float = 0.0
    encoded_bytes: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def plus(self, other: TeacherSums) -> TeacherSums:
        """Both together."""
        return TeacherSums.from_row([a + b for a, b in zip(self.row(), other.row(), strict=True)])

    def row(self) -> list[float]:
        """As numbers, for a collective."""
        return [self.samples, self.missing, self.encoded_bytes, *(self.seconds[stage] for stage in STAGES)]

    @classmethod
    def from_row(cls, row: Sequence[float]) -> TeacherSums:
        """From what `row` gave."""
        samples, missing, encoded_bytes, *seconds = row
        return cls(samples, missing, encoded_bytes, dict(zip(STAGES, seconds, strict=True)))


ROW = len(TeacherSums().row())


@dataclass(slots=True)
class MetricAccumulator:
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
    teachers: dict[str, TeacherSums] = field(default_factory=dict)

    def receive(self, teacher: str, received: DecodedBatch, waited_s: float, decode_s: float) -> None:
        """Adds what one teacher sent for one micro-batch, and how long this rank waited for it."""
        self.stall_s += waited_s
        self.received += received.samples
        self.missing += received.missing
        self.encoded_bytes += received.encoded_bytes
        self.raw_bytes += received.raw_bf16_bytes
        self.teacher_tokens += received.teacher_tokens
        stages = {**received.seconds, "decode": decode_s, "stall": waited_s}
        _add(self.stages, stages)
        sent = TeacherSums(received.samples, received.missing, received.encoded_bytes, stages)
        self.teachers[teacher] = self.teachers.get(teacher, TeacherSums()).plus(sent)

    def lost(self, losses: Mapping[str, float]) -> None:
        """Adds one micro-batch's losses."""
        _add(self.losses, losses)
        self.micro_batches += 1

    def spent(self, seconds: float, align_s: float) -> None:
        """Adds one step's time, and how much of it went to aligning."""
        self.seconds += seconds
        if self.teachers:
            _add(self.stages, {"align": align_s})

    def add(self, other: MetricAccumulator) -> None:
        """Adds another window's sums."""
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        _add(self.losses, other.losses)
        _add(self.stages, other.stages)

    def teacher_rows(self, names: Sequence[str]) -> list[float]:
        """Every teacher's sums in one row of numbers, in this order, for a collective."""
        return [number for name in names for number in self.teachers.get(name, TeacherSums()).row()]

    def figures(self, by_teacher: Mapping[str, TeacherSums], world_size: int) -> dict[str, float]:
        """What is logged of K/V: of all ranks from `by_teacher`, and this rank's stages per micro-batch."""
        sums = TeacherSums()
        for one in by_teacher.values():
            sums = sums.plus(one)
        return {
            "kv/stall_fraction": sums.seconds["stall"] / world_size / self.seconds,
            "kv/bytes_per_sample": sums.encoded_bytes / max(sums.samples, 1.0) * len(by_teacher),
            "kv/missing_samples": sums.missing,
        } | {f"kv/{stage}_s": seconds / max(1, self.micro_batches) for stage, seconds in self.stages.items()}


def from_rows(names: Sequence[str], rows: Sequence[float]) -> dict[str, TeacherSums]:
    """Each teacher's sums from what `teacher_rows` gave."""
    return {name: TeacherSums.from_row(rows[ROW * i : ROW * (i + 1)]) for i, name in enumerate(names)}


def _add(mine: dict[str, float], theirs: Mapping[str, float]) -> None:
    for name, value in theirs.items():
        mine[name] = mine.get(name, 0.0) + value

"""Accumulates losses, times and what teachers sent between two logged steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kvcore.types import Tensor
from student_trainer.kv_sources.kv_batch import TeacherSums


@dataclass(slots=True)
class StepLosses:
    """Sums of one step's losses on the device. Reading a loss waits for the device, so `read` reads all at once."""

    _sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Adds one micro-batch's losses: the same names each time."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()

    def read(self) -> dict[str, float]:
        """The sums. A loss that is not finite in one micro-batch is not finite in its sum."""
        return dict(zip(self._sums, torch.stack(list(self._sums.values())).tolist(), strict=True))


@dataclass(slots=True)
class MetricAccumulator:
    """Sums of one rank. `samples` counts those of all ranks; `align_s` is the part of `seconds` spent on alignment.

    `padding` of `positions` token positions of the texts hold no token.
    """

    micro_batches: int = 0
    padding: int = 0
    positions: int = 0
    samples: int = 0
    seconds: float = 0.0
    align_s: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    teachers: dict[str, TeacherSums] = field(default_factory=dict)

    def add_teacher(self, teacher: str, sums: TeacherSums) -> None:
        """Adds what one teacher sent."""
        self.teachers[teacher] = self.teachers.get(teacher, TeacherSums()) + sums

    def add_losses(self, losses: Mapping[str, float], micro_batches: int) -> None:
        """Adds the sums of some micro-batches' losses."""
        self.micro_batches += micro_batches
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value

    def add_text(self, mask_BT: Tensor) -> None:
        """Adds one micro-batch's text; `mask_BT` is False at padding. It should be on the CPU, as it is read."""
        self.padding += mask_BT.numel() - int(mask_BT.sum())
        self.positions += mask_BT.numel()

    def add_step(self, samples: int, seconds: float, align_s: float) -> None:
        """Adds one optimiser step's samples and time."""
        self.samples += samples
        self.seconds += seconds
        self.align_s += align_s

    def add(self, other: MetricAccumulator) -> None:
        """Adds the time, samples and teachers of another accumulator; its losses are not added."""
        self.add_step(other.samples, other.seconds, other.align_s)
        for name, sums in other.teachers.items():
            self.add_teacher(name, sums)

    def kv_sums(self) -> TeacherSums:
        """Sums over all teachers."""
        return sum(self.teachers.values(), TeacherSums())

    def stages(self) -> dict[str, float]:
        """Seconds by stage, over all teachers; empty without teachers."""
        return self.kv_sums().seconds | {"align": self.align_s} if self.teachers else {}

    def figures(self, by_teacher: Mapping[str, TeacherSums], world_size: int) -> dict[str, float]:
        """The K/V metrics to log. `by_teacher` holds sums over all ranks; stages are this rank's, per micro-batch."""
        total = sum(by_teacher.values(), TeacherSums())
        return {
            "kv/stall_fraction": total.seconds["stall"] / world_size / self.seconds,
            "kv/bytes_per_sample": total.encoded_bytes / max(total.samples, 1.0) * len(by_teacher),
            "kv/missing_samples": total.missing,
        } | {f"kv/{stage}_s": seconds / max(1, self.micro_batches) for stage, seconds in self.stages().items()}

    def teacher_rows(self, names: Sequence[str]) -> list[list[float]]:
        """Every teacher's sums as a row of numbers, in the order of `names`, for a collective."""
        return [self.teachers.get(name, TeacherSums()).row() for name in names]

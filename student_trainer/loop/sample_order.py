"""The samples of each step, micro-batch and rank. They depend only on seed and step, so that runs can resume."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

from data.records import epoch_order
from kvcore.errors import FieldError
from student_trainer.config import RunConfig


class SampleOrder:
    """Splits an endless stream of shuffled epochs into global batches, and those into micro-batches per rank.

    The last batch of an epoch is filled up with samples of the next epoch.

    Raises:
        FieldError: the global batch does not divide into micro-batches over the ranks.
    """

    def __init__(self, run: RunConfig, count: int, rank: int, world_size: int) -> None:
        share = run.micro_batch * world_size
        if run.global_batch % share:
            raise FieldError(
                "run.global_batch",
                f"{run.global_batch} is no multiple of run.micro_batch x ranks = {run.micro_batch} x {world_size}",
            )
        self._run, self._count, self._rank, self._world_size = run, count, rank, world_size
        self.accumulation = run.global_batch // share
        self.steps = run.steps or math.ceil((run.epochs or 0) * count / run.global_batch)
        self._order = lru_cache(maxsize=2)(lambda epoch: epoch_order(count, run.seed, epoch))

    def epoch(self, step: int) -> float:
        """Number of epochs read after `step` steps."""
        return step * self._run.global_batch / self._count

    def micro_batches(self, first_step: int) -> Iterator[list[int]]:
        """This rank's micro-batches (indices of records) from `first_step` to the end of the run."""
        for step in range(first_step, self.steps):
            start = step * self._run.global_batch
            for index in range(self.accumulation):
                offset = start + (index * self._world_size + self._rank) * self._run.micro_batch
                yield [self._record(position) for position in range(offset, offset + self._run.micro_batch)]

    def first(self, count: int) -> list[int]:
        """This rank's share of the first `count` records of the first epoch."""
        return list(self._order(0)[: min(count, self._count)])[self._rank :: self._world_size]

    def _record(self, position: int) -> int:
        return int(self._order(position // self._count)[position % self._count])

"""The samples of each step, micro-batch and rank: a function of seed, step and lengths, so that runs can resume."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.records import epoch_order
from kvcore.errors import FieldError
from student_trainer.config import RunConfig

# Rounds in whose records those of similar length are found. More rounds have less padding and mix an epoch less.
_BUFFER_ROUNDS = 64


class SampleOrder:
    """Splits an endless stream of shuffled epochs into global batches, and those into micro-batches per rank.

    The last batch of an epoch is filled up with samples of the next epoch. The micro-batches that all ranks read at the
    same time are a round.

    Attributes:
        accumulation: rounds per step.
        steps: number of steps of the run.
        batch_size: records in a round.
        round_size: `batch_size` when the run began: the order depends on it.

    Raises:
        FieldError: the global batch does not divide into micro-batches over the ranks.
    """

    def __init__(self, run: RunConfig, count: int, rank: int, world_size: int) -> None:
        share = run.micro_batch * world_size
        if run.global_batch % share:
            raise FieldError(
                "run.global_batch",
                f"{run.global_batch} is not a multiple of run.micro_batch x ranks = {run.micro_batch} x {world_size}",
            )
        self._run, self._count, self._rank, self._world_size = run, count, rank, world_size
        self.accumulation = run.global_batch // share
        self.steps = run.steps or math.ceil((run.epochs or 0) * count / run.global_batch)
        self.batch_size = self.round_size = share
        self._lengths_N: NDArray[Any] | None = None
        self._order = lru_cache(maxsize=2)(self._order_of)

    def sort_by(self, lengths_N: NDArray[Any], round_size: int | None = None) -> None:
        """From now on, the records of a round have similar lengths.

        Args:
            lengths_N: the length of each record, in the same order as the records.
            round_size: that of the run's beginning, if it resumes: its steps then have the same records.
        """
        self._lengths_N, self.round_size = lengths_N, round_size or self.round_size
        self._order.cache_clear()

    def epoch(self, step: int) -> float:
        """Number of epochs read after `step` steps."""
        return step * self._run.global_batch / self._count

    def steps_in(self, epochs: float) -> int:
        """The number of steps, at least 1, whose samples are closest to so many epochs."""
        return max(1, round(epochs * self._count / self._run.global_batch))

    def micro_batches(self, first_step: int) -> Iterator[list[int]]:
        """This rank's micro-batches (indices of records) from `first_step` to the end of the run."""
        for step in range(first_step, self.steps):
            start = step * self._run.global_batch
            for index in range(self.accumulation):
                offset = start + (index * self._world_size + self._rank) * self._run.micro_batch
                yield [self._record(position) for position in range(offset, offset + self._run.micro_batch)]

    def first(self, count: int) -> list[int]:
        """This rank's share of `count` random records, the same whether records are sorted or not."""
        order = epoch_order(self._count, self._run.seed, 0)
        return order[: min(count, self._count)][self._rank :: self._world_size]

    def _record(self, position: int) -> int:
        return int(self._order(position // self._count)[position % self._count])

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        order_N = np.array(epoch_order(self._count, self._run.seed, epoch))
        if self._lengths_N is None:
            return order_N
        # The first records of an epoch fill up the last round of the epoch before.
        begun = min(-epoch * self._count % self.round_size, self._count)
        order_N[begun:] = by_length(order_N[begun:], self._lengths_N, self.round_size)
        return order_N


def by_length(order_N: NDArray[np.int64], lengths: NDArray[Any], round_size: int) -> NDArray[np.int64]:
    """Reorders records so that each round has records of similar length, in ascending order.

    The order is cut into buffers of some rounds. Each buffer is sorted and cut into rounds. These follow each other as
    their first records did before, so at random if the order was random. Records of equal length keep their order. The
    records that are left for an incomplete last round stay where they are.

    Args:
        order_N: indices of records, in random order.
        lengths: the length of every record, by index.
        round_size: records in a round.
    """
    whole = len(order_N) // round_size * round_size
    sorted_N = order_N.copy()
    for start in range(0, whole, _BUFFER_ROUNDS * round_size):
        buffer = order_N[start : min(start + _BUFFER_ROUNDS * round_size, whole)]
        rounds = np.argsort(lengths[buffer], kind="stable").reshape(-1, round_size)
        in_order = rounds[np.argsort(rounds[:, 0])]
        sorted_N[start : start + len(buffer)] = buffer[in_order.ravel()]
    return sorted_N


def padding_share(lengths_N: NDArray[Any], micro_batches: Iterable[list[int]]) -> float:
    """The share of padding among the positions of micro-batches that are padded to their longest record."""
    tokens = positions = 0
    for indices in micro_batches:
        lengths = lengths_N[indices]
        tokens += int(lengths.sum())
        positions += int(lengths.max()) * len(indices)
    return 1 - tokens / max(1, positions)

"""Tests of the sample order: the records of each step, rank and micro-batch in training and validation."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest

from kvcore.errors import FieldError
from student_trainer.config import RunConfig
from student_trainer.loop.greedy_answers import rank_batches
from student_trainer.loop.sample_order import SampleOrder

COUNT, GLOBAL_BATCH, STEPS = 10, 8, 6


def run_config(**changes: Any) -> RunConfig:
    settings = {"output_dir": Path("out"), "seed": 3, "steps": STEPS, "global_batch": GLOBAL_BATCH, "micro_batch": 2}
    return RunConfig(**{**settings, **changes})


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def step_of_all_ranks(micro_batch: int, world_size: int, first_step: int = 0) -> list[list[int]]:
    """The records of each step, ordered by micro-batch, rank and position."""
    ranks = [SampleOrder(run_config(micro_batch=micro_batch), COUNT, rank, world_size) for rank in range(world_size)]
    accumulation = GLOBAL_BATCH // (micro_batch * world_size)
    assert {sampling.accumulation for sampling in ranks} == {accumulation}
    by_rank = [list(sampling.micro_batches(first_step)) for sampling in ranks]
    assert {len(batches) for batches in by_rank} == {(STEPS - first_step) * accumulation}
    assert {len(indices) for batches in by_rank for indices in batches} <= {micro_batch}
    rounds = [[index for batch in same_time for index in batch] for same_time in zip(*by_rank, strict=True)]
    return [flat(rounds[i : i + accumulation]) for i in range(0, len(rounds), accumulation)]


SHAPES = [(1, 1), (8, 1), (2, 2), (4, 2), (1, 4), (1, 8), (2, 4)]
REFERENCE = step_of_all_ranks(8, 1)


@pytest.mark.parametrize(("micro_batch", "world_size"), SHAPES)
def test_records_of_a_step_do_not_depend_on_ranks_or_micro_batches(micro_batch: int, world_size: int) -> None:
    assert step_of_all_ranks(micro_batch, world_size) == REFERENCE


@pytest.mark.parametrize(("micro_batch", "world_size"), SHAPES)
def test_order_can_resume_at_any_step(micro_batch: int, world_size: int) -> None:
    for first in range(STEPS + 1):
        assert step_of_all_ranks(micro_batch, world_size, first) == REFERENCE[first:]


def test_epochs_follow_without_a_gap_and_have_different_orders() -> None:
    stream = flat(REFERENCE)
    epochs = [stream[start : start + COUNT] for start in range(0, len(stream) - COUNT + 1, COUNT)]
    assert len(epochs) == 4
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_order_depends_on_the_seed() -> None:
    other = SampleOrder(run_config(seed=4, micro_batch=8), COUNT, 0, 1)
    assert list(other.micro_batches(0)) != REFERENCE


def test_epochs_are_converted_to_steps_rounded_up() -> None:
    assert SampleOrder(run_config(steps=None, epochs=2), COUNT, 0, 1).steps == 3
    assert SampleOrder(run_config(steps=None, epochs=4), COUNT, 0, 1).steps == 5
    assert SampleOrder(run_config(), COUNT, 0, 1).steps == STEPS


def test_steps_are_converted_to_epochs() -> None:
    assert SampleOrder(run_config(), COUNT, 0, 1).epoch(5) == 4.0


@pytest.mark.parametrize(("micro_batch", "world_size"), [(3, 1), (2, 3), (16, 1), (8, 2)])
def test_global_batch_not_divisible_by_ranks_and_micro_batch_is_refused(micro_batch: int, world_size: int) -> None:
    with pytest.raises(FieldError, match=rf"run\.global_batch: 8 .* {micro_batch} x {world_size}"):
        SampleOrder(run_config(micro_batch=micro_batch), COUNT, 0, world_size)


@pytest.mark.parametrize(("wanted", "given"), [(7, 7), (10, 10), (500, 10), (1, 1)])
def test_ranks_share_the_first_records_of_the_first_epoch(wanted: int, given: int) -> None:
    for world_size in (1, 2, 4):
        shares = [SampleOrder(run_config(), COUNT, rank, world_size).first(wanted) for rank in range(world_size)]
        assert sorted(flat(shares)) == sorted(flat(REFERENCE)[:given])


@pytest.mark.parametrize(("count", "micro_batch", "world_size"), [*product([1, 2, 5, 8, 9, 17], [1, 2, 4], [1, 2, 3])])
def test_validation_counts_each_record_once_with_equal_passes_per_rank(
    count: int, micro_batch: int, world_size: int
) -> None:
    by_rank = [rank_batches(count, micro_batch, rank, world_size) for rank in range(world_size)]
    counted = [index for batches in by_rank for indices, number in batches for index in indices[:number]]
    assert sorted(counted) == list(range(count))
    shapes = {tuple(len(indices) for indices, _ in batches) for batches in by_rank}
    assert len(shapes) == 1, "ranks that share parameters run the same passes"
    assert set(*shapes) == {micro_batch}
    assert all(0 <= index < count for batches in by_rank for indices, _ in batches for index in indices)

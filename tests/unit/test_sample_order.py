"""Tests of the sample order: the records of each step, rank and micro-batch in training and validation."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.records import epoch_order
from kvcore.errors import FieldError
from student_trainer.config import RunConfig
from student_trainer.loop.greedy_answers import rank_batches
from student_trainer.loop.sample_order import SampleOrder, by_length, padding_share

COUNT, GLOBAL_BATCH, STEPS = 10, 8, 6


def run_config(**changes: Any) -> RunConfig:
    settings = {"output_dir": Path("out"), "seed": 3, "steps": STEPS, "global_batch": GLOBAL_BATCH, "micro_batch": 2}
    return RunConfig(**{**settings, **changes})


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def step_of_all_ranks(
    micro_batch: int, world_size: int, first_step: int = 0, round_size: int | None = None
) -> list[list[int]]:
    """The records of each step by micro-batch, rank and position; sorted by length if a `round_size` is given."""
    ranks = [SampleOrder(run_config(micro_batch=micro_batch), COUNT, rank, world_size) for rank in range(world_size)]
    for rank in ranks:
        if round_size is not None:
            rank.sort_by(LENGTHS, round_size)
    accumulation = GLOBAL_BATCH // (micro_batch * world_size)
    assert {sampling.accumulation for sampling in ranks} == {accumulation}
    by_rank = [list(sampling.micro_batches(first_step)) for sampling in ranks]
    assert {len(batches) for batches in by_rank} == {(STEPS - first_step) * accumulation}
    assert {len(indices) for batches in by_rank for indices in batches} <= {micro_batch}
    rounds = [[index for batch in same_time for index in batch] for same_time in zip(*by_rank, strict=True)]
    return [flat(rounds[i : i + accumulation]) for i in range(0, len(rounds), accumulation)]


SHAPES = [(1, 1), (8, 1), (2, 2), (4, 2), (1, 4), (1, 8), (2, 4)]
LENGTHS = np.array([30, 4, 17, 4, 90, 8, 25, 4, 61, 12])
REFERENCE = step_of_all_ranks(8, 1)


@pytest.mark.parametrize(("micro_batch", "world_size"), SHAPES)
def test_records_of_a_step_do_not_depend_on_ranks_or_micro_batches(micro_batch: int, world_size: int) -> None:
    assert step_of_all_ranks(micro_batch, world_size) == REFERENCE


@pytest.mark.parametrize(("micro_batch", "world_size"), SHAPES)
def test_order_can_resume_at_any_step(micro_batch: int, world_size: int) -> None:
    for first in range(STEPS + 1):
        assert step_of_all_ranks(micro_batch, world_size, first) == REFERENCE[first:]


@pytest.mark.parametrize(("micro_batch", "world_size"), SHAPES)
def test_sorted_order_can_resume_at_any_step_with_another_number_of_ranks(micro_batch: int, world_size: int) -> None:
    for begun_with in (2, 4, 8):
        reference = step_of_all_ranks(begun_with, 1, round_size=begun_with)
        for first in range(STEPS + 1):
            assert step_of_all_ranks(micro_batch, world_size, first, begun_with) == reference[first:]


@pytest.mark.parametrize("round_size", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("count", [1, 7, 10, 64, 101])
def test_sorted_epochs_have_every_record_once(count: int, round_size: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 9, count)
    run = run_config(steps=20 * count, global_batch=round_size, micro_batch=round_size)
    order = SampleOrder(run, count, 0, 1)
    order.sort_by(lengths)
    stream = flat(order.micro_batches(0))
    assert len(stream) == 20 * count * round_size
    for start in range(0, len(stream) - count + 1, count):
        assert sorted(stream[start : start + count]) == list(range(count))


def test_ranks_read_records_of_similar_length_at_the_same_time() -> None:
    count, micro_batch, world_size = 1000, 4, 3
    lengths = np.random.default_rng(0).permutation(count)
    run = run_config(epochs=3, steps=None, global_batch=48, micro_batch=micro_batch)
    ranks = [SampleOrder(run, count, rank, world_size) for rank in range(world_size)]
    for rank in ranks:
        rank.sort_by(lengths)
    rounds = [flat(batches) for batches in zip(*(rank.micro_batches(0) for rank in ranks), strict=True)]
    spans = [int(np.ptp(lengths[indices])) for indices in rounds]
    # 1000 is not a multiple of 12: one round of each epoch is random, the others are a 64th of a buffer.
    assert np.percentile(spans, 95) < count / 8
    means = np.array([lengths[indices].mean() for indices in rounds])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3, "rounds of any length follow each other"
    per_step = means.reshape(-1, 4).mean(axis=1)
    assert per_step.std() < 0.7 * means.std(), "a global batch mixes short and long samples"


def test_rounds_are_consecutive_in_their_sorted_buffer() -> None:
    lengths = np.random.default_rng(1).integers(1, 50, 300)
    order = np.array(epoch_order(300, 0, 0))
    found = by_length(order, lengths, 4).tolist()
    for start in range(0, 300, 256):
        buffer = order[start : start + 256].tolist()
        place = {record: at for at, record in enumerate(buffer)}
        ranked = sorted(buffer, key=lambda record: (lengths[record], place[record]))
        rounds = [ranked[at : at + 4] for at in range(0, len(ranked), 4)]
        assert found[start : start + 256] == flat(sorted(rounds, key=lambda one: place[one[0]]))


def test_records_of_equal_length_keep_their_random_order() -> None:
    order = SampleOrder(run_config(micro_batch=8), COUNT, 0, 1)
    order.sort_by(np.full(COUNT, 7))
    assert list(order.micro_batches(0)) == REFERENCE


def test_sorting_does_not_change_the_calibration_samples() -> None:
    plain, by_lengths = SampleOrder(run_config(), COUNT, 0, 2), SampleOrder(run_config(), COUNT, 0, 2)
    by_lengths.sort_by(LENGTHS)
    assert by_lengths.first(7) == plain.first(7)


def test_padding_share_counts_positions_without_a_token() -> None:
    lengths = np.array([1, 4, 2, 2])
    assert padding_share(lengths, [[0, 1], [2, 3]]) == pytest.approx(3 / 12)
    assert padding_share(lengths, [[0, 2], [3, 3]]) == pytest.approx(1 / 8)


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

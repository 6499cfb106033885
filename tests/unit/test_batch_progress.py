"""Tests that a vLLM batch emits each layer and each failure once, and ignores other batches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pytest
import torch

from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.types import Sample
from teacher_server.engines.base import LayerResult, PlannedSample, SampleFailure, TokenizedSample
from teacher_server.engines.vllm import batch_progress
from teacher_server.engines.vllm.assembly import Assembly
from teacher_server.engines.vllm.batch_progress import BatchProgress, Ended
from teacher_server.engines.vllm.message_queue import FailureMessage, LayerMessage

PLAN = KVPlan(layers=(0, 1), selection=Selection(span="all"), codec=CodecSpec(name="raw"))
PLANNED = PlannedSample(TokenizedSample(Sample("s"), (), (), ()), PLAN)


@dataclass
class Batch:
    """A batch of two samples that records its calls to the caller and to vLLM."""

    results: list[LayerResult] = field(default_factory=list)
    failures: list[SampleFailure] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.assembly = Assembly(["a", "b"], [PLANNED, PLANNED], kv_heads=1)
        abort = {row: lambda row=row: self.aborted.append(row) for row in range(2)}
        self.progress = BatchProgress(self.assembly, self.results.append, self.failures.append, abort)


def layer(number: int, *tags: str) -> LayerMessage:
    parts = {f"{kind}.data": torch.zeros(len(tags), 1, 2, 4) for kind in "kv"}
    errors = {kind: [0.0] * len(tags) for kind in "kv"}
    return LayerMessage(
        list(tags), number, 0, 1, parts, torch.zeros(len(tags), 1, 2, dtype=torch.int32), errors, {}, 0.5
    )


def test_batch_ends_after_all_layers_and_sums_encoding_times() -> None:
    batch = Batch()
    for number in (0, 1):
        batch.progress.on_message(layer(number, "a", "b"))
    batch.progress.on_ended(Ended("a", None, 3))
    assert batch.progress.runs
    batch.progress.on_ended(Ended("b", None, 4))
    assert not batch.assembly.open_rows()
    assert not batch.progress.runs
    assert [result.layer for result in batch.results] == [0, 1]
    timings = batch.progress.timings()
    assert (timings.encode_s, timings.cached_tokens) == (1.0, 7)
    assert timings.prefill_s > 0.0


def test_events_of_another_batch_are_ignored() -> None:
    batch = Batch()
    batch.progress.on_ended(Ended("earlier", "refused", 9))
    batch.progress.on_message(layer(0, "earlier"))
    batch.progress.on_message(FailureMessage(["earlier"], "lost"))
    assert batch.assembly.open_rows() == [0, 1]
    assert not batch.failures
    assert batch.progress.timings().cached_tokens == 0


def test_sample_refused_by_vllm_fails_once_without_affecting_others() -> None:
    batch = Batch()
    batch.progress.on_ended(Ended("a", "too long"))
    batch.progress.on_message(FailureMessage(["a"], "again"))
    batch.progress.on_message(layer(0, "a", "b"))
    assert batch.failures == [SampleFailure(0, "too long")]
    assert [result.indices for result in batch.results] == [[1]]


def test_unwanted_sample_is_aborted_without_failure() -> None:
    batch = Batch()
    batch.progress.give_up(lambda row: row == 1)
    batch.progress.on_message(layer(0, "a"))
    assert batch.aborted == [0]
    assert batch.assembly.open_rows() == [1]
    assert not batch.failures
    assert not batch.results


def test_overdue_layers_fail_their_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch()
    monkeypatch.setattr(batch_progress, "HANDOVER_SECONDS", 0.0)
    batch.progress.give_up(lambda _row: True)
    assert not batch.failures
    batch.progress.on_ended(Ended("a", None))
    batch.progress.give_up(lambda _row: True)
    (failure,) = batch.failures
    assert failure.index == 0
    assert "incomplete" in failure.problem
    assert batch.assembly.open_rows() == [1]


def test_encoding_time_is_the_time_of_the_slowest_rank() -> None:
    batch = Batch()
    batch.progress.on_message(layer(0, "a"))
    batch.progress.on_message(dataclasses.replace(layer(0, "b"), heads_from=1, encode_s=0.75))
    assert batch.progress.timings().encode_s == 0.75


def test_batch_ends_if_all_samples_are_unwanted() -> None:
    batch = Batch()
    batch.progress.give_up(lambda _row: False)
    assert not batch.progress.runs


def test_arriving_layers_extend_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch()
    monkeypatch.setattr(batch_progress, "HANDOVER_SECONDS", 0.0)
    batch.progress.on_ended(Ended("a", None))
    monkeypatch.setattr(batch_progress, "HANDOVER_SECONDS", 1000.0)
    batch.progress.on_message(layer(0, "b"))
    batch.progress.give_up(lambda _row: True)
    assert not batch.failures

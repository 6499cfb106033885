"""Tests of the comparison between replicas, and of a replica with its own K/V from before."""

import dataclasses
import logging

import pytest
import torch

from kvcore.errors import TeacherBusyError, TeacherMismatchError, TeacherUnavailableError
from kvcore.types import EncodedSampleKV, MissingKV, TeacherInfo, Tensor
from student_trainer.kv_sources import parity, replica, retry_budget
from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.kv_sources.parity import largest_difference, parity_plan, parity_sample
from tests.support.kv_fakes import INFO, kv_of, samples
from tests.support.scripted_replica import ScriptedReplica


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch):
    monkeypatch.setattr(replica, "FIRST_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(replica, "LONGEST_BACKOFF_SECONDS", 0.04)
    monkeypatch.setattr(retry_budget, "WINDOW_SECONDS", 0.1)


@pytest.fixture
def a() -> ScriptedReplica:
    return ScriptedReplica("host-a:1")


@pytest.fixture
def b() -> ScriptedReplica:
    return ScriptedReplica("host-b:2")


def source_of(*replicas: ScriptedReplica) -> FailoverSource:
    return FailoverSource("math", replicas, patience_s=0.3)


def test_replicas_with_other_kv_end_the_start_of_a_run(a, b):
    b.kv_noise = 1.0
    with pytest.raises(
        TeacherMismatchError, match=r"'math': host-b:2 computes other K/V than host-a:1 did: they differ by \d+%"
    ):
        source_of(a, b).connect()


def test_rounding_differences_are_accepted(a, b):
    b.kv_noise = 0.05
    source_of(a, b).connect()


def test_a_replica_that_returns_with_other_kv_is_set_aside(a, b):
    source = source_of(a, b)
    source.connect()
    a.answers_left = 0
    source.fetch(samples(2))
    a.answers_left, a.kv_noise, b.answers_left = None, 1.0, 1
    requests = len(a.asked)
    with pytest.raises(TeacherUnavailableError, match="host-a:1 computes other K/V"):
        source.fetch(samples(2))
    assert len(a.asked) == requests, "it was asked for samples"
    assert source.set_aside == 1


def test_weights_that_change_in_memory_are_noticed_after_the_interval(a, b, monkeypatch):
    source = source_of(a, b)
    source.connect()
    a.kv_noise = 1.0
    source.fetch(samples(2))
    assert len(a.asked[-1]) == 2
    assert source.set_aside == 0
    monkeypatch.setattr(parity, "INTERVAL_SECONDS", 0.0)
    source.fetch(samples(2))
    assert len(b.asked[-1]) == 2
    assert (source.set_aside, source.switches) == (1, 1)


def test_connected_replicas_are_compared_once_per_interval(a, b):
    source = source_of(a, b)
    source.connect()
    for _ in range(4):
        source.fetch(samples(1))
    assert (a.parity_checks, b.parity_checks) == (1, 1)


def test_a_single_endpoint_is_not_compared(a):
    source_of(a).connect()
    assert a.parity_checks == 0


def test_a_full_replica_that_is_connected_is_compared_later(a, b, monkeypatch):
    source = source_of(a, b)
    source.connect()
    monkeypatch.setattr(parity, "INTERVAL_SECONDS", 0.0)
    a.parity = TeacherBusyError("math", "its queue is full", 1.0)
    source.fetch(samples(1))
    assert a.asked[-1] == ["s0"]
    a.parity, a.kv_noise = None, 1.0
    source.fetch(samples(2))
    assert (a.asked[-1], b.asked[-1]) == (["s0"], ["s0", "s1"])


def test_a_full_replica_that_connects_is_not_waited_for(a, b):
    a.parity = TeacherBusyError("math", "its queue is full", 60.0)
    source_of(a, b).fetch(samples(2))
    assert (len(a.asked), len(b.asked)) == (0, 1)


def test_replicas_without_kv_of_the_tokens_are_used_and_not_compared(a, b, caplog):
    a.parity = b.parity = MissingKV("parity", "the model has a vocabulary of 9")
    source = source_of(a, b)
    with caplog.at_level(logging.WARNING):
        source.connect()
        source.fetch(samples(2))
    assert [record.getMessage() for record in caplog.records] == [
        "teacher 'math': its replicas cannot be compared: the model has a vocabulary of 9"
    ]


def test_a_replica_without_kv_of_the_tokens_beside_one_that_has_some_is_refused(a, b):
    b.parity = MissingKV("parity", "NaN")
    with pytest.raises(TeacherMismatchError, match="host-b:2 has no K/V where host-a:1 had some: NaN"):
        source_of(a, b).connect()


def kv(values_HMD: Tensor | None = None, info: TeacherInfo = INFO) -> EncodedSampleKV:
    """The K/V by which replicas are compared, with other values."""
    found = kv_of(parity_sample(info), info, parity_plan(info))
    if values_HMD is not None:
        found.parts["v.data"] = values_HMD[None]
    return found


def test_difference_is_the_median_over_tokens_of_keys_or_values():
    v_HMD = kv().parts["v.data"][0]
    # Half of the norm of every token, and ten times that of 7 of 16 tokens.
    half, few = v_HMD * 1.5, v_HMD.clone()
    few[:, :7] *= 11
    sizes = v_HMD.double().movedim(1, 0).flatten(1).norm(dim=1)
    expected = 0.5 * sizes.median() / sizes.square().mean().sqrt()
    assert largest_difference(kv(half), kv()) == pytest.approx(expected.item())
    assert largest_difference(kv(few), kv()) == 0.0


def test_difference_is_infinite_if_tokens_or_shapes_differ_and_0_between_zeros():
    other = kv()
    other.token_ids_T = other.token_ids_T + 1
    assert largest_difference(kv(), other) == float("inf")
    assert largest_difference(kv(info=dataclasses.replace(INFO, head_dim=8)), kv()) == float("inf")
    zeros = kv(torch.zeros_like(kv().parts["v.data"][0]))
    assert largest_difference(zeros, zeros) == 0.0
    assert largest_difference(kv(), zeros) == float("inf")


def test_no_more_tokens_are_compared_than_the_teacher_reads():
    assert parity_sample(dataclasses.replace(INFO, max_sample_tokens=4)).token_ids == (0, 1, 2, 3)

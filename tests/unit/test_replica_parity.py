"""Tests of the comparison between replicas, and of a replica with its own K/V from before."""

import pytest

from kvcore.errors import TeacherMismatchError, TeacherUnavailableError
from student_trainer.kv_sources import parity, replica
from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.kv_sources.parity import SAMPLE, parity_plan, relative_difference
from tests.support.kv_fakes import INFO, kv_of, samples
from tests.support.scripted_replica import ScriptedReplica


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch):
    monkeypatch.setattr(replica, "FIRST_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(replica, "LONGEST_BACKOFF_SECONDS", 0.04)


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


def test_difference_is_infinite_if_the_tokens_differ():
    kv, other = (kv_of(SAMPLE, INFO, parity_plan(INFO)) for _ in range(2))
    assert relative_difference(kv, other) == 0.0
    other.token_ids_T = other.token_ids_T + 1
    assert relative_difference(kv, other) == float("inf")

"""Tests of failover between replicas, recovery of endpoints and loss of teachers."""

import dataclasses
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from kvcore.errors import ProtocolError, TeacherMismatchError, TeacherRefusedError, TeacherUnavailableError
from kvcore.types import Sample
from student_trainer.kv_sources import failover
from student_trainer.kv_sources.base import KVResult
from student_trainer.kv_sources.failover import FailoverSource
from tests.support.kv_fakes import INFO, PLAN, samples
from tests.support.scripted_replica import ScriptedReplica

Failure = Exception | None


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch):
    monkeypatch.setattr(failover, "FIRST_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(failover, "LONGEST_BACKOFF_SECONDS", 0.04)


@pytest.fixture
def a() -> ScriptedReplica:
    return ScriptedReplica("host-a:1")


@pytest.fixture
def b() -> ScriptedReplica:
    return ScriptedReplica("host-b:2")


def source_of(*replicas: ScriptedReplica, patience_s: float = 5.0, start: int = 0) -> FailoverSource:
    return FailoverSource("math", replicas, patience_s, start)


def ids(results: Sequence[KVResult]) -> list[str]:
    return [result.sample_id for result in results]


def test_ranks_start_with_different_replicas(a, b):
    for rank in range(4):
        source_of(a, b, start=rank).fetch(samples(1))
    assert len(a.asked) == len(b.asked) == 2


def test_only_missing_samples_are_requested_from_the_next_replica(a, b):
    a.answers_left = 3
    source = source_of(a, b)
    assert ids(source.fetch(samples(5))) == ["s0", "s1", "s2", "s3", "s4"]
    assert a.asked == [["s0", "s1", "s2", "s3", "s4"]]
    assert b.asked == [["s3", "s4"]]
    assert (source.switches, source.retries) == (1, 1)


def test_a_switch_to_another_replica_is_kept_and_logged_once(a, b, caplog):
    a.answers_left = 0
    source = source_of(a, b)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            source.fetch(samples(2))
    assert (len(a.asked), len(b.asked), source.switches) == (1, 3, 1)
    assert [record.getMessage() for record in caplog.records if "switched" in record.getMessage()] == [
        "teacher 'math': switched from host-a:1 to host-b:2"
    ]


def test_a_replica_that_is_down_at_the_start_is_skipped(a, b):
    a.up = False
    source = source_of(a, b)
    assert source.connect() == INFO
    assert source.plan == PLAN
    assert ids(source.fetch(samples(2))) == ["s0", "s1"]


def test_a_replica_that_was_down_is_used_when_the_other_fails(a, b):
    a.up = False
    source = source_of(a, b)
    source.connect()
    a.up, b.answers_left = True, 0
    assert ids(source.fetch(samples(2))) == ["s0", "s1"]
    assert a.asked == [["s0", "s1"]]


def test_the_only_replica_is_retried_until_it_answers(a):
    source = source_of(a)
    a.up = False
    recovery = threading.Timer(0.1, setattr, (a, "up", True))
    recovery.start()
    assert ids(source.fetch(samples(2))) == ["s0", "s1"]
    assert source.switches == 0
    assert source.retries >= 2


def test_replicas_that_fail_slowly_do_not_starve_another_replica(a, b):
    def fail_slowly(samples: Sequence[Sample], received: dict[str, KVResult]) -> None:
        threading.Event().wait(0.06)  # longer than the longest backoff, so one of the two is always due
        raise a.error

    a.fetch_into = b.fetch_into = fail_slowly
    c = ScriptedReplica("host-c:3")
    c.answers_left = 0
    threading.Timer(0.15, setattr, (c, "answers_left", None)).start()
    assert ids(source_of(a, b, c, patience_s=1.5).fetch(samples(2))) == ["s0", "s1"]


def test_patience_restarts_when_a_failing_replica_answers_some_samples(a):
    a.answers_left = 1

    def one_more(samples: Sequence[Sample], received: dict[str, KVResult]) -> None:
        try:
            ScriptedReplica.fetch_into(a, samples, received)
        finally:
            a.answers_left = 1

    a.fetch_into = one_more
    source = source_of(a, patience_s=0.1)
    assert ids(source.fetch(samples(8))) == [f"s{i}" for i in range(8)]


@pytest.mark.parametrize("patience_s", [0.0, 0.1])
def test_a_lost_teacher_is_reported_with_every_endpoint_and_its_last_error(a, b, patience_s):
    source = source_of(a, b, patience_s=patience_s)
    source.connect()
    a.answers_left = 0
    b.up = False
    b.answers_left = 0
    with pytest.raises(TeacherUnavailableError) as caught:
        source.fetch(samples(2))
    message = str(caught.value)
    assert message.startswith("teacher 'math': no endpoint answered for ")
    assert "host-a:1: UNAVAILABLE: connection reset" in message
    assert "host-b:2: UNAVAILABLE: connection re" in message
    assert "/readyz" in message
    assert a.asked
    assert b.asked


def test_without_patience_a_replica_that_failed_earlier_is_still_tried(a, b):
    source = source_of(a, b, patience_s=0.0)
    a.answers_left = 0
    source.fetch(samples(1))
    threading.Event().wait(0.05)
    a.answers_left, b.answers_left = None, 0
    assert ids(source.fetch(samples(1))) == ["s0"]


def test_a_replica_with_other_weights_is_refused_at_the_start(a):
    other = ScriptedReplica("host-c:3", dataclasses.replace(INFO, weights_digest="ff" * 16))
    with pytest.raises(TeacherMismatchError, match=r"host-c:3 serves .* but host-a:1 served .*"):
        source_of(a, other).connect()


def test_a_server_restarted_with_other_weights_is_refused(a, b):
    source = source_of(a, b)
    source.connect()
    a.answers_left = 0
    source.fetch(samples(1))
    threading.Event().wait(0.05)
    a.info = dataclasses.replace(INFO, layers=7)
    a.answers_left, b.answers_left = None, 0
    with pytest.raises(TeacherMismatchError, match="7 layers"):
        source.fetch(samples(1))
    assert a.asked == [[], ["s0"]]


def test_a_refusal_is_not_retried(a, b):
    a.answers_left = 0
    a.error = TeacherRefusedError("math", "plan.layers: 9 is above 2")
    with pytest.raises(TeacherRefusedError, match="9 is above 2"):
        source_of(a, b).fetch(samples(2))
    assert b.asked == []


def test_damaged_bytes_of_one_replica_are_replaced_by_another(a, b):
    a.answers_left = 1
    a.error = ProtocolError("xxh3 of frame 4 does not match")
    assert ids(source_of(a, b).fetch(samples(3))) == ["s0", "s1", "s2"]
    assert b.asked == [["s1", "s2"]]


def test_damaged_bytes_from_every_replica_are_reported(a, b):
    for replica in (a, b):
        replica.answers_left = 0
        replica.error = ProtocolError("xxh3 of frame 4 does not match")
    with pytest.raises(ProtocolError, match="xxh3 of frame 4"):
        source_of(a, b, patience_s=0.05).fetch(samples(3))


def test_close_ends_a_fetch_that_waits_for_the_teacher(a):
    source = source_of(a, patience_s=60.0)
    a.up = False
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(source.fetch, samples(1))
        threading.Event().wait(0.05)
        source.close()
        assert isinstance(running.exception(timeout=5), CancelledError)
    assert a.closed

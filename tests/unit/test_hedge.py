"""Tests of second requests to another replica, and of how replicas are measured, with replicas in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError

import pytest

from kvcore.errors import TeacherMismatchError, TeacherUnavailableError
from kvcore.types import Sample
from student_trainer.kv_sources import hedge, replica, retry_budget
from student_trainer.kv_sources.base import KVResult
from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.kv_sources.hedge import SHORTEST_DELAY_SECONDS, TIMES_NEEDED, RecentTimes
from tests.support.kv_fakes import kv_of, samples
from tests.support.scripted_replica import ScriptedReplica

GATE_SECONDS = 10.0


class HeldReplica(ScriptedReplica):
    """Holds each answer after `answers_held` samples while `gate` is closed, until it is cancelled."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.gate = threading.Event()
        self.gate.set()
        self.answers_before = self.cancellations = 0

    def fetch_into(self, samples: Sequence[Sample], received: dict[str, KVResult]) -> None:
        if not self.gate.is_set():
            self.asked.append([sample.id for sample in samples if sample.id not in received])
            for sample in samples[: self.answers_before]:
                received[sample.id] = kv_of(sample)
            for _ in range(int(GATE_SECONDS * 100)):
                if self.cancelled.is_set():
                    self.cancellations += 1
                    raise CancelledError
                if self.gate.wait(0.01):
                    break
        super().fetch_into(samples, received)


@pytest.fixture
def a() -> Iterator[HeldReplica]:
    one = HeldReplica("host-a:1")
    yield one
    one.gate.set()


@pytest.fixture
def b() -> ScriptedReplica:
    return ScriptedReplica("host-b:2")


def measured(*replicas: ScriptedReplica, hedge: bool = True) -> FailoverSource:
    """A source that knows how long answers take."""
    source = FailoverSource("math", replicas, patience_s=5.0, hedge=hedge)
    source.connect()
    for _ in range(TIMES_NEEDED + 1):
        source.fetch(samples(1, "before"))
    for one in replicas:
        one.asked.clear()
    return source


def ids(results: Sequence[KVResult]) -> list[str]:
    return [result.sample_id for result in results]


def test_only_samples_that_the_slow_replica_has_not_answered_are_asked_of_another_one(a, b):
    source = measured(a, b)
    a.gate.clear()
    a.answers_before = 2
    assert ids(source.fetch(samples(5))) == ["s0", "s1", "s2", "s3", "s4"]
    assert b.asked == [["s2", "s3", "s4"]]
    assert a.cancellations == 1
    assert (source.hedges, source.switches, source.retries) == (1, 0, 0)


def test_both_replicas_can_be_used_after_a_hedge(a, b):
    source = measured(a, b)
    a.gate.clear()
    source.fetch(samples(2))
    a.gate.set()
    assert ids(source.fetch(samples(2, "t"))) == ["t0", "t1"]
    assert a.asked[-1] == ["t0", "t1"], "one slow answer is no reason to leave a replica"
    assert not a.cancelled.is_set()
    assert not b.cancelled.is_set()


def test_the_slow_replica_is_waited_for_if_the_other_one_fails(a, b):
    source = measured(a, b)
    a.gate.clear()
    b.answers_left = 0
    threading.Timer(0.3, a.gate.set).start()
    assert ids(source.fetch(samples(2))) == ["s0", "s1"]
    assert len(b.asked) == 1
    problems = [one.problem for one in source.health().endpoints]
    assert problems == [None, "UNAVAILABLE: connection reset"]
    assert source.switches == 0


def test_the_other_replica_is_compared_before_its_answer_is_used(a, b, monkeypatch):
    source = measured(a, b)
    monkeypatch.setattr("student_trainer.kv_sources.parity.INTERVAL_SECONDS", 0.0)
    a.gate.clear()
    b.parity = TeacherMismatchError("math", "host-b:2 computes other K/V")
    threading.Timer(0.3, a.gate.set).start()
    assert ids(source.fetch(samples(2))) == ["s0", "s1"]
    assert b.asked == []


def test_no_hedge_without_other_replicas_enough_answers_room_in_the_budget_or_permission(a, b, monkeypatch):
    def hedges(source: FailoverSource) -> int:
        a.gate.clear()
        timer = threading.Timer(0.3, a.gate.set)
        timer.start()
        source.fetch(samples(1))
        timer.join()
        return source.hedges

    assert hedges(measured(a, b)) == 1
    assert hedges(measured(a)) == 0
    assert hedges(measured(a, b, hedge=False)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(hedge, "TIMES_NEEDED", 100)
        assert hedges(measured(a, b)) == 0
    monkeypatch.setattr(retry_budget, "WINDOW_SECONDS", 600.0)
    source = measured(a, b)
    while a.budget.wait_s() == 0.0:
        a.budget.spend()
    assert hedges(source) == 0, "what one replica repeats counts for all of them"


def test_closing_ends_a_hedged_fetch(a, b):
    source = measured(a, b)
    a.gate.clear()

    def close(_samples: Sequence[Sample], _received: dict[str, KVResult]) -> None:
        source.close()
        a.cancelled.set()
        raise CancelledError

    b.fetch_into = close
    with pytest.raises(CancelledError):
        source.fetch(samples(1))


def test_a_sample_that_ends_both_replicas_of_a_hedge_is_suspected_at_once(a, b, caplog):
    source = measured(a, b)
    a.gate.clear()

    def fail(asked: Sequence[Sample], _received: dict[str, KVResult]) -> None:
        b.asked.append([sample.id for sample in asked])
        a.error, a.answers_left = TeacherUnavailableError("math", "UNAVAILABLE: Socket closed"), 0
        a.gate.set()
        threading.Timer(0.2, setattr, (a, "answers_left", None)).start()
        raise TeacherUnavailableError("math", "UNAVAILABLE: Socket closed")

    b.fetch_into = fail
    source.fetch(samples(2))
    assert "2 endpoints failed on requests with the same samples; requesting each alone: s0, s1" in caplog.text
    assert [len(asked) for asked in b.asked] == [2] + [1] * (len(b.asked) - 1)


def test_the_delay_is_what_95_percent_of_the_answers_took_per_sample():
    times = RecentTimes()
    for number in range(TIMES_NEEDED - 1):
        times.add(1.0, 1)
        assert times.hedge_delay(1) is None, f"{number + 1} answers are too few"
    times = RecentTimes()
    for number in range(1, 101):
        times.add(float(number) * 4, 4)
    assert times.hedge_delay(1) == 95.0
    assert times.hedge_delay(3) == 3 * 95.0
    for _ in range(100):
        times.add(1e-6, 1)
    assert times.hedge_delay(1) == SHORTEST_DELAY_SECONDS, "old answers are forgotten"


def paced(one: ScriptedReplica, seconds: Sequence[float]) -> ScriptedReplica:
    """The replica, whose requests take this long, the last one for all later ones."""
    left = list(seconds)

    def fetch_into(samples: Sequence[Sample], received: dict[str, KVResult]) -> None:
        threading.Event().wait(left.pop(0) if len(left) > 1 else left[0])
        ScriptedReplica.fetch_into(one, samples, received)

    one.fetch_into = fetch_into
    return one


def test_a_replica_that_was_slow_when_it_was_measured_is_measured_again(monkeypatch):
    a, b = ScriptedReplica("host-a:1"), ScriptedReplica("host-b:2")
    source = FailoverSource("math", [paced(a, [0.0] * 5 + [0.06]), paced(b, [0.3, 0.0])], patience_s=5.0)
    source.connect()
    for _ in range(5):
        source.fetch(samples(1))
    assert len(b.asked) == 1
    assert source.switches == 0
    monkeypatch.setattr(replica, "MEASURE_AGAIN_SECONDS", 1.5)
    threading.Event().wait(1.6)
    # The replica is measured beside the requests, which takes longer on a busy machine.
    for _ in range(100):
        source.fetch(samples(1))
        if source.switches:
            break
    assert (source.health().current, source.switches) == ("host-b:2", 1)

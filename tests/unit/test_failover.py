"""Tests of failover between replicas, recovery of endpoints and loss of teachers."""

import dataclasses
import logging
import re
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from kvcore.errors import (
    EndpointRefusedError,
    FieldError,
    ProtocolError,
    TeacherBusyError,
    TeacherMismatchError,
    TeacherRefusedError,
    TeacherUnavailableError,
)
from kvcore.types import MissingKV, Sample
from student_trainer.kv_sources import replica, retry_budget
from student_trainer.kv_sources.base import KVResult
from student_trainer.kv_sources.failover import FailoverSource
from tests.support.kv_fakes import INFO, PLAN, samples
from tests.support.scripted_replica import ScriptedReplica

Failure = Exception | None


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
    source = source_of(a, patience_s=2.0)
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


def test_a_server_restarted_with_other_weights_is_set_aside_while_another_one_serves(a, b, caplog):
    source = source_of(a, b)
    source.connect()
    a.answers_left = 0
    source.fetch(samples(1))
    threading.Event().wait(0.05)
    a.info = dataclasses.replace(INFO, layers=7)
    a.answers_left, b.answers_left = None, 0
    threading.Timer(0.1, setattr, (b, "answers_left", None)).start()
    with caplog.at_level(logging.WARNING):
        assert ids(source.fetch(samples(1))) == ["s0"]
    assert a.asked == [[], ["s0"]], "nothing is requested from another teacher"
    assert [one.problem is None for one in source.health().endpoints] == [False, True]
    assert "7 layers" in (source.health().endpoints[0].problem or "")
    assert source.set_aside == 1
    assert (
        len(
            [
                line
                for line in caplog.messages
                if "7 layers" in line and "is not used while another replica works" in line
            ]
        )
        == 1
    )


def test_the_only_server_restarted_with_other_weights_is_refused(a):
    source = source_of(a)
    source.connect()
    a.answers_left = 0
    a.info = dataclasses.replace(INFO, layers=7)
    with pytest.raises(TeacherMismatchError, match="7 layers"):
        source.fetch(samples(1))


def test_a_replica_for_which_no_plan_can_be_made_is_set_aside(a, b):
    source = source_of(a, b)
    source.connect()
    a.answers_left = 0
    source.fetch(samples(1))
    threading.Event().wait(0.05)
    a.answers_left, b.answers_left = None, 0
    threading.Timer(0.1, setattr, (b, "answers_left", None)).start()

    def connect() -> None:
        raise FieldError("align.layer_map", "needs 12 layers")

    a.connect = connect
    assert ids(source.fetch(samples(1))) == ["s0"]
    health = source.health()
    assert (health.set_aside, health.endpoints[0].problem) == (1, "host-a:1: align.layer_map: needs 12 layers")


REFUSED = EndpointRefusedError("math", "host-a:1 refused: this server requires a token")


@pytest.mark.parametrize("when", ["connects", "is asked"])
def test_a_replica_that_refuses_its_callers_is_set_aside_warned_of_and_counted(a, b, caplog, when):
    if when == "connects":
        a.connect_error, a.up = REFUSED, False
    else:
        a.error, a.answers_left = REFUSED, 0
    source = source_of(a, b)
    with caplog.at_level(logging.WARNING):
        source.connect()
        for _ in range(3):
            assert ids(source.fetch(samples(2))) == ["s0", "s1"]
    assert len([line for line in caplog.messages if "requires a token" in line]) == 1
    health = source.health()
    assert (health.set_aside, health.endpoints[1].problem) == (1, None)
    assert health.endpoints[0].problem == "host-a:1 refused: this server requires a token"


def test_endpoints_that_all_refuse_are_reported_at_once(a, b):
    for one in (a, b):
        one.connect_error = EndpointRefusedError("math", f"{one.endpoint} refused: Method not found")
        one.up = False
    source = source_of(a, b, patience_s=600.0)
    with pytest.raises(EndpointRefusedError, match=r"host-a:1 refused: Method .*host-b:2 refused: Method"):
        source.connect()
    a.up = True
    threading.Event().wait(0.02)
    assert source.connect() == INFO, "a later call asks again"


def test_a_refusing_replica_does_not_end_the_wait_for_one_that_is_down(a, b):
    a.connect_error, a.up = REFUSED, False
    b.up = False
    threading.Timer(0.1, setattr, (b, "up", True)).start()
    assert source_of(a, b).connect() == INFO


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
    for one in (a, b):
        one.answers_left = 0
        one.error = ProtocolError("xxh3 of frame 4 does not match")
    with pytest.raises(ProtocolError, match="xxh3 of frame 4"):
        source_of(a, b, patience_s=0.05).fetch(samples(3))


def killed_by(sample_id: str, one: ScriptedReplica) -> ScriptedReplica:
    """The replica, which each request with this sample ends before it answers that one; it restarts at once."""

    def fetch_into(samples: Sequence[Sample], received: dict[str, KVResult]) -> None:
        asked = [sample.id for sample in samples if sample.id not in received]
        one.answers_left = asked.index(sample_id) if sample_id in asked else None
        ScriptedReplica.fetch_into(one, samples, received)

    one.fetch_into = fetch_into
    return one


def test_a_sample_on_which_all_servers_fail_is_requested_alone_once_and_is_then_missing(a, b):
    c = ScriptedReplica("host-c:3")
    source = source_of(*(killed_by("s2", one) for one in (a, b, c)))
    results = source.fetch(samples(5))
    assert ids(results) == ["s0", "s1", "s2", "s3", "s4"]
    assert isinstance(results[2], MissingKV)
    assert (
        "2 endpoints failed on requests with it, and another one on a request with it alone (host-c:3: UNAVAILABLE"
        in results[2].reason
    )
    assert not [result for place, result in enumerate(results) if place != 2 and isinstance(result, MissingKV)]
    assert [asked for one in (a, b, c) for asked in one.asked if "s2" in asked] == [
        ["s0", "s1", "s2", "s3", "s4"],
        ["s2", "s3", "s4"],
        ["s2"],
    ]


def test_the_only_sample_of_a_batch_that_no_server_survives_is_missing(a, b):
    source = source_of(*(killed_by("s0", one) for one in (a, b)))
    (result,) = source.fetch(samples(1))
    assert isinstance(result, MissingKV)
    assert sum(len(one.asked) for one in (a, b)) == 3


def full(problem: str = "1048576 tokens wait already", wait_s: float = 0.0) -> TeacherBusyError:
    return TeacherBusyError("math", problem, wait_s)


def test_another_replica_is_tried_before_a_full_one_is_waited_for(a, b, caplog):
    a.answers_left, a.error = 0, full(wait_s=600.0)
    source = source_of(a, b)
    with caplog.at_level(logging.WARNING):
        assert ids(source.fetch(samples(3))) == ["s0", "s1", "s2"]
    assert (a.asked, b.asked) == ([["s0", "s1", "s2"]], [["s0", "s1", "s2"]])
    assert [one.problem for one in source.health().endpoints] == [None, None], "a full replica is not down"
    assert caplog.messages == []


def test_replicas_that_stay_full_are_reported_after_the_patience(a, b):
    for one in (a, b):
        one.answers_left, one.error = 0, full()
    with pytest.raises(TeacherBusyError, match=r"still full after 0\.\d s \(host-a:1: 1048576 .*; host-b:2: 10"):
        source_of(a, b, patience_s=0.3).fetch(samples(1))


def test_a_full_replica_that_asks_for_no_delay_is_not_asked_all_the_time(a):
    a.answers_left, a.error = 0, full(wait_s=0.0)
    with pytest.raises(TeacherBusyError):
        source_of(a, patience_s=1.0).fetch(samples(1))
    assert 2 <= len(a.asked) <= 20


def test_the_delay_before_a_full_server_is_asked_again_grows_and_differs_between_callers(monkeypatch):
    monkeypatch.setattr(replica, "LONGEST_BACKOFF_SECONDS", 8.0)
    delays = [[replica.busy_delay(0.0, refusals) for _ in range(200)] for refusals in range(12)]
    assert all(0.05 <= delay <= 0.05 + 8.0 for row in delays for delay in row)
    assert max(delays[0]) <= 0.1
    assert max(delays[11]) > 4.0
    assert all(len(set(row)) > 100 for row in delays)
    assert all(replica.busy_delay(3.0, 0) >= 3.0 for _ in range(20)), "never earlier than the server asked for"


def paced(one: ScriptedReplica, seconds: float) -> ScriptedReplica:
    """The replica, which takes this long for each request."""

    def fetch_into(samples: Sequence[Sample], received: dict[str, KVResult]) -> None:
        threading.Event().wait(seconds)
        ScriptedReplica.fetch_into(one, samples, received)

    one.fetch_into = fetch_into
    return one


def test_a_replica_that_is_several_times_slower_is_left(a, b, caplog):
    source = source_of(paced(a, 0.08), b)
    source.connect()
    with caplog.at_level(logging.WARNING):
        for _ in range(8):
            source.fetch(samples(1))
    assert (len(a.asked), len(b.asked), source.switches) == (1 + 3, 5, 1)
    assert re.search(r"switched from host-a:1 to host-b:2 \(0\.\d+ against 0\.\d+ s per sample\)", caplog.text)


def test_a_slower_replica_is_asked_once_to_measure_it_and_not_again(a, b):
    source = source_of(a, paced(b, 0.08))
    source.connect()
    for _ in range(8):
        source.fetch(samples(1))
    assert (len(b.asked), source.switches) == (1, 0)


def test_ranks_measure_different_replicas_at_a_time():
    replicas = [ScriptedReplica(f"host-{number}:1") for number in range(3)]
    ranks = [source_of(*replicas, start=rank) for rank in range(3)]
    for source in ranks:
        source.connect()
    for number in range(5):
        for one in replicas:
            one.asked.clear()
        for source in ranks:
            source.fetch(samples(1))
        assert [len(one.asked) for one in replicas] == [1, 1, 1], f"request {number} of each rank"


def test_a_source_that_waits_once_fails_at_once_until_the_teacher_answers_again(a, b):
    source = FailoverSource("math", [a, b], 0.3, waits_once=True)
    source.connect()
    a.up = b.up = False
    a.answers_left = b.answers_left = 0
    with pytest.raises(TeacherUnavailableError):
        source.fetch(samples(1))
    asked = a.connects + b.connects
    for _ in range(20):
        with pytest.raises(TeacherUnavailableError, match="no endpoint answered for"):
            source.fetch(samples(1))
    assert a.connects + b.connects <= asked + 4, "an endpoint is tried again only after its backoff"
    a.up, a.answers_left = True, None
    threading.Event().wait(0.05)
    assert ids(source.fetch(samples(1))) == ["s0"]


def test_close_ends_a_fetch_that_waits_for_the_teacher(a):
    source = source_of(a, patience_s=60.0)
    a.up = False
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(source.fetch, samples(1))
        threading.Event().wait(0.05)
        source.close()
        assert isinstance(running.exception(timeout=5), CancelledError)
    assert a.closed

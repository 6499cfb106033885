"""Tests of replicas that answer slowly, or refuse all the time, with whole servers in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import grpc
import pytest

from kvcore.errors import TeacherUnavailableError
from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.types import Sample
from student_trainer.kv_sources import hedge, replica, retry_budget
from student_trainer.kv_sources.base import KVResult
from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.kv_sources.remote import RemoteSource
from student_trainer.kv_sources.replica import MOST_OVERTAKEN
from student_trainer.kv_sources.retry_budget import ALLOWED
from teacher_server.config import ServeConfig
from teacher_server.engines.base import LayerSink, TokenizedSample
from teacher_server.engines.fake import FakeEngine, FakeModel
from tests.support import kv_fakes
from tests.support.kv_fakes import same_result
from tests.support.scripted_teacher import Script, ScriptedTeacher
from tests.support.server_in_thread import ServerInThread
from tests.support.servers import wait_until

PLAN = KVPlan(layers=(0, 1), selection=Selection(selector="right", budget=4, span="all"), codec=CodecSpec(name="int8"))
# How long a slow server takes for a batch, unless the test ends before.
SLOW_SECONDS = 30.0
MEASURED = 12


class SlowEngine(FakeEngine):
    """A fake teacher that can become slow. `batches`: the sample ids of each batch."""

    def __init__(self, config: ServeConfig) -> None:
        super().__init__(config, FakeModel(layers=2))
        self.slow = False
        self.released = threading.Event()
        self.batches: list[list[str]] = []

    def prefill(
        self, batch: Sequence[TokenizedSample], layers: Sequence[int], with_importance: bool, sink: LayerSink
    ) -> None:
        self.batches.append([tokens.sample.id for tokens in batch])
        if self.slow:
            self.released.wait(SLOW_SECONDS)
        super().prefill(batch, layers, with_importance, sink)

    def asked_for(self, sample_id: str) -> bool:
        return any(sample_id in batch for batch in self.batches)


class Server:
    """A whole server and its engine."""

    def __init__(self) -> None:
        self.engines: list[SlowEngine] = []
        config = ServeConfig(model="fake:layers=2", engine="fake", drain_seconds=0.2)
        self.running = ServerInThread(self._load, config)
        self.running.wait_ready()

    @property
    def engine(self) -> SlowEngine:
        return self.engines[0]

    def cancelled_calls(self) -> int:
        lines = self.running.get("/metrics").text.splitlines()
        return sum(int(float(line.split()[-1])) for line in lines if "requests_total{" in line and "CANCELLED" in line)

    def stop(self) -> None:
        self.engine.released.set()
        self.running.stop()

    def _load(self, config: ServeConfig) -> SlowEngine:
        self.engines.append(SlowEngine(config))
        return self.engines[0]


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    first, other = Server(), Server()
    yield first, other
    first.stop()
    other.stop()


def source_of(*servers: Server, may_hedge: bool = True) -> FailoverSource:
    remotes = [RemoteSource("math", one.running.endpoint, lambda _: PLAN, 60.0) for one in servers]
    source = FailoverSource("math", remotes, patience_s=20.0, hedge=may_hedge)
    source.connect()
    return source


def samples(batch: int) -> list[Sample]:
    return [Sample(f"b{batch}-{i}", text=f"{batch} and {i} is {batch + i}") for i in range(3)]


def fetch(source: FailoverSource, batches: range) -> list[KVResult]:
    return [result for batch in batches for result in source.fetch(samples(batch))]


def same(left: list[KVResult], right: list[KVResult]) -> bool:
    return len(left) == len(right) and all(same_result(*pair) for pair in zip(left, right, strict=True))


def test_another_replica_answers_for_a_slow_one_which_is_cancelled_and_then_left(
    servers: tuple[Server, Server], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine, a quick server must not look slow.
    monkeypatch.setattr(hedge, "SHORTEST_DELAY_SECONDS", 1.0)
    monkeypatch.setattr(replica, "SLOWER_SECONDS", 1.0)
    first, other = servers
    batches = range(MEASURED + MOST_OVERTAKEN + 4)
    with closing(source_of(other)) as calm:
        expected = fetch(calm, batches)
    with closing(source_of(first, other)) as source:
        results = fetch(source, batches[:MEASURED])
        assert source.health().current == first.running.endpoint
        hedged_before = source.hedges
        first.engine.slow = True
        results += fetch(source, batches[MEASURED:])
        health = source.health()
    assert same(results, expected)
    assert source.hedges - hedged_before == MOST_OVERTAKEN
    assert (health.current, health.switches) == (other.running.endpoint, 1)
    assert f"answered first {MOST_OVERTAKEN} times in a row" in caplog.text
    # After it was left, the slow server is asked for nothing more.
    first.engine.released.set()
    wait_until(lambda: first.cancelled_calls() >= MOST_OVERTAKEN)
    assert not first.engine.asked_for(f"b{batches[-1]}-0")


def test_a_source_that_does_not_hedge_waits_for_the_slow_replica(servers: tuple[Server, Server]) -> None:
    first, other = servers
    with closing(source_of(first, other, may_hedge=False)) as source:
        fetch(source, range(MEASURED))
        first.engine.slow = True
        threading.Timer(1.0, first.engine.released.set).start()
        source.fetch(samples(MEASURED))
    assert source.hedges == 0
    assert first.engine.asked_for(f"b{MEASURED}-0")
    assert not other.engine.asked_for(f"b{MEASURED}-0")


def first_time(seen: set[str], teacher: Callable[[], ScriptedTeacher], code: grpc.StatusCode) -> Script:
    """Refuses each sample the first time that any server is asked for it, and allows a retry at once."""

    def script(sent: int, context: grpc.ServicerContext) -> None:
        (sample_id,) = teacher().requests[-1]
        if sent == 0 and sample_id not in seen:
            seen.add(sample_id)
            context.set_trailing_metadata((("grpc-retry-pushback-ms", "0"),))
            context.abort(code, "refused once")

    return script


@pytest.mark.parametrize("code", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE])
@pytest.mark.parametrize("replicas", [1, 2])
def test_servers_that_refuse_get_at_most_a_fifth_more_requests(
    monkeypatch: pytest.MonkeyPatch, code: grpc.StatusCode, replicas: int
) -> None:
    monkeypatch.setattr(replica, "FIRST_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(replica, "FIRST_BUSY_SECONDS", 0.005)
    monkeypatch.setattr(replica, "LONGEST_BACKOFF_SECONDS", 0.02)
    monkeypatch.setattr(retry_budget, "WINDOW_SECONDS", 3600.0)
    teachers = [ScriptedTeacher() for _ in range(replicas)]
    remotes = [RemoteSource("math", one.endpoint, lambda _: kv_fakes.PLAN) for one in teachers]
    source = FailoverSource("math", remotes, patience_s=0.05)
    source.connect()
    seen: set[str] = set()
    for teacher in teachers:
        teacher.script = first_time(seen, lambda teacher=teacher: teacher, code)
    answered = 0
    for sample in kv_fakes.samples(60):
        try:
            source.fetch([sample])
        except TeacherUnavailableError:
            continue
        answered += 1
    attempts = sum(len(teacher.requests) for teacher in teachers)
    source.close()
    for teacher in teachers:
        teacher.stop()
    assert answered >= ALLOWED, "the allowance is used"
    assert 60 + answered <= attempts <= ALLOWED + 1 + 1.2 * 60

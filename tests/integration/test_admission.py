"""Tests of admission: a busy server refuses before it tokenizes, and a short request does not wait for long ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import grpc
import pytest

from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.types import EncodedSampleKV, Sample
from teacher_server.engines.base import TokenizedSample
from teacher_server.engines.fake import FakeEngine, FakeModel
from tests.support.server_in_thread import CONFIG, ServerInThread
from tests.support.servers import Outcome, Refusal, TeacherClient, refused, wait_until

PLAN = KVPlan(layers=(0,), selection=Selection(selector="right", budget=1, span="all"), codec=CodecSpec(name="raw"))
LONG = 2000
# Room for six long requests, which the server estimates at a token per byte after its self-test.
QUEUED_TOKENS = 13_500


class GatedTokenizer(FakeEngine):
    """Waits for its gate before it tokenizes a long text."""

    def __init__(self) -> None:
        super().__init__(CONFIG, FakeModel(layers=2))
        self.gate = threading.Event()
        self.order: list[str] = []

    def tokenize(self, sample: Sample) -> TokenizedSample:
        self.order.append(sample.id)
        if sample.text is not None and len(sample.text) >= LONG:
            assert self.gate.wait(60)
        return super().tokenize(sample)


@pytest.fixture
def engine() -> GatedTokenizer:
    return GatedTokenizer()


@pytest.fixture
def server(engine: GatedTokenizer) -> Iterator[ServerInThread]:
    config = CONFIG.model_copy(update={"max_queued_tokens": QUEUED_TOKENS})
    running = ServerInThread(lambda _config: engine, config)
    running.wait_ready()
    engine.order.clear()
    yield running
    engine.gate.set()
    running.stop()


def ask(server: ServerInThread, name: str, length: int) -> list[Outcome] | Refusal:
    """One request over a connection of its own."""
    outcomes: list[list[Outcome]] = []
    with TeacherClient(server.endpoint) as client:
        try:
            outcomes.append(client.fetch(PLAN, [Sample(name, text="a" * length)], timeout=60))
        except grpc.RpcError as error:
            failed = error
            return refused(lambda: (_ for _ in ()).throw(failed))
    return outcomes[0]


def test_requests_are_refused_while_the_tokenizer_is_busy_with_admitted_ones(
    server: ServerInThread, engine: GatedTokenizer
) -> None:
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(ask, server, f"long {number}", LONG) for number in range(12)]
        wait_until(lambda: sum(future.done() for future in asked) == 6)
        refusals = [future.result() for future in asked if future.done()]
        assert engine.order == engine.order[:1]
        engine.gate.set()
        outcomes = [future.result() for future in asked]
    for refusal in refusals:
        assert isinstance(refusal, Refusal)
        assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert f"the limit is {QUEUED_TOKENS}" in refusal.details
        assert refusal.pushback_ms is not None
    answered = [outcome for outcome in outcomes if not isinstance(outcome, Refusal)]
    assert len(answered) == 6
    assert all(isinstance(outcome, EncodedSampleKV) for (outcome,) in answered)


def test_a_short_request_is_tokenized_before_the_waiting_long_ones(
    server: ServerInThread, engine: GatedTokenizer
) -> None:
    def submit(name: str, length: int, open_streams: int) -> Future[list[Outcome] | Refusal]:
        future = pool.submit(ask, server, name, length)
        wait_until(lambda: server.get("/info").json()["load"]["open_streams"] == open_streams)
        return future

    with ThreadPoolExecutor(6) as pool, TeacherClient(server.endpoint) as client:
        many = pool.submit(
            client.fetch, PLAN, [Sample(f"{number}", text="a" * LONG) for number in range(2)], timeout=60
        )
        wait_until(lambda: engine.order == ["0"])
        others = [submit(f"long {number}", LONG, 2 + number) for number in range(3)]
        short = submit("short", 60, 5)
        engine.gate.set()
        assert not isinstance(short.result(), Refusal)
        assert len(many.result()) == 2
        assert not any(isinstance(other.result(), Refusal) for other in others)
    # One text may be tokenized before the short one has been parsed.
    assert engine.order.index("short") <= 2, engine.order

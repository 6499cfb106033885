"""Tests of the teacher server with an engine that the test controls: it waits, fails, or emits too much."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2

from kvcore.errors import UnsupportedModelError
from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.types import EncodedSampleKV, Sample
from kvcore.wire.frames import unpack_frame
from kvcore.wire.messages import TEACHER_METADATA, teacher_metadata
from kvcore.wire.stream_reader import RefusedSample
from teacher_server import app
from teacher_server.config import ServeConfig
from teacher_server.engines.base import LayerOutput, LayerSink, TeacherEngine, TokenizedSample
from teacher_server.engines.fake import FakeEngine, FakeFaults, FakeModel
from tests.support.server_in_thread import CONFIG, ServerInThread
from tests.support.servers import TeacherClient, refused, token_samples, wait_until

PLAN = KVPlan(layers=(0, 1), selection=Selection(selector="full", span="all"), codec=CodecSpec(name="raw"))


@pytest.fixture
def start() -> Iterator[Callable[..., ServerInThread]]:
    servers: list[ServerInThread] = []

    def start_one(*arguments: Any) -> ServerInThread:
        servers.append(ServerInThread(*arguments))
        return servers[-1]

    yield start_one
    for server in servers:
        server.stop()


class GatedEngine(FakeEngine):
    """Computes layer 0, then waits for its gate, except in the self-test."""

    def __init__(self, config: ServeConfig) -> None:
        super().__init__(config, FakeModel(layers=2))
        self.gate = threading.Event()
        self.largest_batch = 0
        self.begun: list[str] = []

    def prefill(
        self, batch: Sequence[TokenizedSample], layers: Sequence[int], with_importance: bool, sink: LayerSink
    ) -> None:
        self.largest_batch = max(self.largest_batch, len(batch))
        self.begun.append(batch[0].sample.id)

        def gated(output: LayerOutput) -> None:
            if output.layer > 0 and batch[0].sample.id != "self-test":
                assert self.gate.wait(60)
            sink(output)

        super().prefill(batch, layers, with_importance, gated)


class SharedEngine(GatedEngine):
    """Runs two batches at the same time."""

    @property
    def concurrent_batches(self) -> int:
        return 2


class BreakableEngine(FakeEngine):
    """Works until `broken` is set."""

    def __init__(self) -> None:
        super().__init__(CONFIG, FakeModel(layers=2))
        self.broken = threading.Event()

    def prefill(
        self, batch: Sequence[TokenizedSample], layers: Sequence[int], with_importance: bool, sink: LayerSink
    ) -> None:
        if self.broken.is_set():
            raise RuntimeError("CUDA error: secret internals")
        super().prefill(batch, layers, with_importance, sink)


def load_of(server: ServerInThread) -> dict[str, int]:
    return server.get("/info").json()["load"]


IDLE = {"open_streams": 0, "queued_samples": 0, "queued_tokens": 0}


def samples(*names: str) -> list[Sample]:
    return [Sample(name, token_ids=(1, 2, 3, 4)) for name in names]


def test_probes_follow_loading_then_ready_then_draining(start: Callable[..., ServerInThread]) -> None:
    may_load = threading.Event()

    def load(config: ServeConfig) -> TeacherEngine:
        may_load.wait(20)
        return FakeEngine(config, FakeModel(layers=2, delay_ms=20))

    server = start(load)
    assert server.get("/healthz").status_code == 200
    assert (server.get("/readyz").status_code, server.get("/readyz").text) == (503, "the model is loading\n")
    assert server.health() == health_pb2.HealthCheckResponse.NOT_SERVING
    assert server.get("/info").json()["teacher"] is None
    with grpc.insecure_channel(server.endpoint) as channel:
        early = refused(lambda: channel.unary_unary("/kvcache.v1.TeacherKV/Describe")(b"", timeout=10))
    assert early.code is grpc.StatusCode.UNAVAILABLE
    assert "loading" in early.details
    may_load.set()
    server.wait_ready()
    assert server.health() == health_pb2.HealthCheckResponse.SERVING
    assert "kvdistill_ready 1.0" in server.get("/metrics").text
    server.stop()
    assert server.ended.result() is True


def test_slow_loading_is_logged(
    start: Callable[..., ServerInThread], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app, "LOADING_SECONDS", 0.02)
    caplog.set_level("INFO")
    logged = threading.Event()

    def load(config: ServeConfig) -> TeacherEngine:
        logged.wait(20)
        return FakeEngine(config, FakeModel(layers=2))

    server = start(load)
    wait_until(lambda: caplog.messages.count("loading") >= 2)
    logged.set()
    server.wait_ready()
    assert caplog.records[caplog.messages.index("loading")].fields["model"] == "fake:layers=2"  # pyright: ignore[reportAttributeAccessIssue]


def test_a_loading_error_ends_the_server(start: Callable[..., ServerInThread]) -> None:
    def load(_config: ServeConfig) -> TeacherEngine:
        raise UnsupportedModelError("no such attention")

    with pytest.raises(UnsupportedModelError, match="no such attention"):
        start(load).ended.result(20)

    def crash(_config: ServeConfig) -> TeacherEngine:
        raise OSError("disk on fire")

    with pytest.raises(app.LoadError, match=r"model: 'fake:layers=2' cannot be loaded: OSError: disk on fire"):
        start(crash).ended.result(20)


def test_a_failed_self_test_ends_the_server(start: Callable[..., ServerInThread]) -> None:
    def load(config: ServeConfig) -> TeacherEngine:
        return FakeEngine(config, FakeModel(layers=2), FakeFaults(not_finite=frozenset({"self-test"})))

    with pytest.raises(app.SelfTestError, match="not finite"):
        start(load).ended.result(20)


def test_an_engine_error_fails_only_the_samples_of_its_batch(
    start: Callable[..., ServerInThread],
) -> None:
    faults = FakeFaults(fail=frozenset({"poison"}), not_finite=frozenset({"nan"}))
    server = start(lambda config: FakeEngine(config, FakeModel(layers=2), faults))
    server.wait_ready()
    with TeacherClient(server.endpoint) as client:
        poisoned = client.fetch(PLAN, samples("a", "poison"))
        assert [outcome.code for outcome in poisoned if isinstance(outcome, RefusedSample)] == ["INTERNAL", "INTERNAL"]
        assert all(
            "injected fault" not in outcome.message for outcome in poisoned if isinstance(outcome, RefusedSample)
        )
        mixed = client.fetch(PLAN, samples("a", "nan", "b"))
        assert [isinstance(outcome, EncodedSampleKV) for outcome in mixed] == [True, False, True]
        assert isinstance(mixed[1], RefusedSample)
        assert mixed[1].code == "FAILED_PRECONDITION"
    assert server.get("/readyz").status_code == 200
    metrics = server.get("/metrics").text
    assert "kvdistill_engine_errors_total 1.0" in metrics
    assert 'kvdistill_samples_total{status="INTERNAL"} 2.0' in metrics
    wait_until(lambda: load_of(server) == IDLE)


def test_the_server_is_not_ready_while_its_engine_is_broken(
    start: Callable[..., ServerInThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "RETEST_SECONDS", 0.05)
    engine = BreakableEngine()
    server = start(lambda _config: engine)
    server.wait_ready()
    with TeacherClient(server.endpoint) as client:
        engine.broken.set()
        assert isinstance(client.fetch(PLAN, samples("a"))[0], RefusedSample)
        wait_until(lambda: server.get("/readyz").status_code == 503)
        assert "self-test failed" in server.get("/readyz").text
        assert server.health() == health_pb2.HealthCheckResponse.NOT_SERVING
        refusal = refused(lambda: client.fetch(PLAN, samples("b")))
        assert refusal.code is grpc.StatusCode.UNAVAILABLE
        assert "secret" not in refusal.details
        engine.broken.clear()
        server.wait_ready()
        assert isinstance(client.fetch(PLAN, samples("c"))[0], EncodedSampleKV)


def test_a_plan_with_a_warning_is_logged_once(
    start: Callable[..., ServerInThread], caplog: pytest.LogCaptureFixture
) -> None:
    server = start(lambda config: FakeEngine(config, FakeModel(layers=2)))
    server.wait_ready()
    plans = [
        KVPlan(layers=(0, 1), selection=Selection(selector=selector, budget=2, span="all"))
        for selector in ("right", "keydiff", "keydiff")
    ]
    with TeacherClient(server.endpoint) as client:
        for plan in plans:
            client.fetch(plan, samples("a"))
    (logged,) = [record for record in caplog.records if record.message == "plan_warning"]
    assert "'keydiff' keeps few informative tokens" in getattr(logged, "fields", {})["problem"]


def test_an_unexpected_error_shows_an_id_without_internals(
    start: Callable[..., ServerInThread], caplog: pytest.LogCaptureFixture
) -> None:
    class Bug(FakeEngine):
        def tokenize(self, sample: Sample) -> TokenizedSample:
            if sample.id == "bug":
                raise KeyError("secret internals")
            return super().tokenize(sample)

    server = start(lambda config: Bug(config, FakeModel(layers=2)))
    server.wait_ready()
    with TeacherClient(server.endpoint) as client:
        broken = refused(lambda: client.fetch(PLAN, samples("bug")))
        assert broken.code is grpc.StatusCode.INTERNAL
        assert "secret" not in broken.details
        error_id = broken.details.split()[2].rstrip(";")
        logged = next(record for record in caplog.records if getattr(record, "fields", {}).get("error_id") == error_id)
        assert logged.exc_info is not None
        assert isinstance(client.fetch(PLAN, samples("fine"))[0], EncodedSampleKV)


def test_results_that_break_the_frame_writer_end_only_their_stream(start: Callable[..., ServerInThread]) -> None:
    class OddLayers(FakeEngine):
        """Emits layer 0 twice."""

        def prefill(
            self, batch: Sequence[TokenizedSample], layers: Sequence[int], with_importance: bool, sink: LayerSink
        ) -> None:
            super().prefill(batch, layers, with_importance, sink)
            if batch[0].sample.id == "twice":
                super().prefill(batch, layers, with_importance, sink)

    server = start(lambda config: OddLayers(config, FakeModel(layers=2)))
    server.wait_ready()
    with TeacherClient(server.endpoint) as client:
        broken = refused(lambda: list(client.call(PLAN, samples("twice"))))
        assert broken.code is grpc.StatusCode.INTERNAL
        assert isinstance(client.fetch(PLAN, samples("fine"))[0], EncodedSampleKV)
    wait_until(lambda: load_of(server) == IDLE)


def start_gated(start: Callable[..., ServerInThread], **limits: object) -> tuple[ServerInThread, GatedEngine]:
    config = CONFIG.model_copy(update=limits)
    engine = GatedEngine(config)
    server = start(lambda _config: engine, config)
    server.wait_ready()
    return server, engine


def test_layers_are_sent_while_later_layers_are_computed(start: Callable[..., ServerInThread]) -> None:
    server, engine = start_gated(start)
    with TeacherClient(server.endpoint) as client:
        stream = client.call(PLAN, samples("a", "b"))
        records = unpack_frame(next(stream))[0]["records"]
        assert [record["kind"] for record in records] == ["sample", "sample", "layer"]
        assert (records[2]["indices"], records[2]["layer"]) == ([0, 1], 0)
        engine.gate.set()
        rest = [record for frame in stream for record in unpack_frame(frame)[0]["records"]]
    assert [record["kind"] for record in rest] == ["layer", "sample_end", "sample_end", "end"]


def test_streams_that_share_a_batch_get_their_own_samples(start: Callable[..., ServerInThread]) -> None:
    server, engine = start_gated(start)
    requests = [[Sample(f"{turn}-{i}", token_ids=(turn, i, 3, 4)) for i in range(3)] for turn in range(2)]
    with TeacherClient(server.endpoint) as client, ThreadPoolExecutor(2) as pool:
        first = client.call(PLAN, samples("first"))
        next(first)
        together = [pool.submit(client.fetch, PLAN, request) for request in requests]
        wait_until(lambda: load_of(server)["queued_samples"] == 6)
        engine.gate.set()
        shared = [future.result(60) for future in together]
        alone = [client.fetch(PLAN, request) for request in requests]
    assert engine.largest_batch == 6
    for got, wanted in zip(itertools.chain(*shared), itertools.chain(*alone), strict=True):
        assert isinstance(got, EncodedSampleKV)
        assert isinstance(wanted, EncodedSampleKV)
        assert got.sample_id == wanted.sample_id
        assert all(torch.equal(got.parts[name], wanted.parts[name]) for name in wanted.parts)


def test_a_full_queue_returns_a_retry_time_and_cancelling_makes_room(
    start: Callable[..., ServerInThread],
) -> None:
    server, engine = start_gated(start, max_queued_tokens=1500, max_batch_tokens=800)
    with TeacherClient(server.endpoint) as client:
        first = client.call(PLAN, token_samples(3, 400))
        wait_until(lambda: load_of(server) == {"open_streams": 1, "queued_samples": 1, "queued_tokens": 1200})
        full = client.call(PLAN, token_samples(1, 400))
        refusal = refused(lambda: list(full))
        # gRPC's retry policy does not retry a call that received anything, even initial metadata.
        assert not full.initial_metadata()
        assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (refusal.pushback_ms or 0) >= 50
        first.cancel()
        # The running sample counts until the engine has finished it; the waiting ones are removed.
        wait_until(lambda: load_of(server) == {"open_streams": 0, "queued_samples": 0, "queued_tokens": 800})
        second = client.call(PLAN, token_samples(1, 400))
        wait_until(lambda: load_of(server)["queued_tokens"] == 1200)
        engine.gate.set()
        assert len(list(second)) > 0
        assert dict(second.initial_metadata())[TEACHER_METADATA] == teacher_metadata(client.info)
    wait_until(lambda: load_of(server) == IDLE)


def test_an_exceeded_deadline_frees_the_slot(start: Callable[..., ServerInThread]) -> None:
    server, engine = start_gated(start, max_batch_tokens=4)
    with TeacherClient(server.endpoint) as client:
        late = refused(lambda: list(client.call(PLAN, samples("a", "b"), timeout=0.3)))
        assert late.code is grpc.StatusCode.DEADLINE_EXCEEDED
        engine.gate.set()
        wait_until(lambda: load_of(server) == IDLE)
        assert len(client.fetch(PLAN, samples("c"))) == 1
    assert 'code="DEADLINE_EXCEEDED",method="StreamKV"} 1.0' in server.get("/metrics").text


def test_a_call_without_a_deadline_gets_max_request_seconds(start: Callable[..., ServerInThread]) -> None:
    server, engine = start_gated(start, max_request_seconds=0.3)
    with TeacherClient(server.endpoint) as client:
        late = refused(lambda: list(client.call(PLAN, samples("a"), timeout=None)))
        assert late.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "max_request_seconds" in late.details
    engine.gate.set()


def test_calls_beyond_max_streams_get_a_retry_time(start: Callable[..., ServerInThread]) -> None:
    server, engine = start_gated(start, max_streams=1)
    with TeacherClient(server.endpoint) as client:
        first = client.call(PLAN, samples("a"))
        wait_until(lambda: load_of(server)["open_streams"] == 1)
        refusal = refused(lambda: client.fetch(PLAN, samples("b")))
        assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refusal.pushback_ms == 200
        engine.gate.set()
        assert len(list(first)) > 0


class SlowlyClosedEngine(FakeEngine):
    """Needs a while to free its model."""

    def __init__(self, config: ServeConfig) -> None:
        super().__init__(config, FakeModel(layers=2))
        self.closing, self.may_close = threading.Event(), threading.Event()

    def close(self) -> None:
        self.closing.set()
        assert self.may_close.wait(60)


def test_liveness_answers_until_the_engine_is_closed(start: Callable[..., ServerInThread]) -> None:
    engine = SlowlyClosedEngine(CONFIG)
    server = start(lambda _config: engine)
    server.wait_ready()
    server.request_stop()
    assert engine.closing.wait(30)
    try:
        assert server.get("/healthz").status_code == 200
        assert server.get("/readyz").status_code == 503
    finally:
        engine.may_close.set()
    assert server.ended.result(30) is True


@pytest.mark.parametrize(("engine_of", "at_once"), [(GatedEngine, 1), (SharedEngine, 2)])
def test_as_many_batches_run_at_the_same_time_as_the_engine_takes(
    start: Callable[..., ServerInThread], engine_of: type[GatedEngine], at_once: int
) -> None:
    engine = engine_of(CONFIG)
    config = CONFIG.model_copy(update={"max_batch_tokens": 20})
    engine.gate.set()
    server = start(lambda _config: engine, config)
    server.wait_ready()
    engine.gate.clear()
    engine.begun.clear()
    with ThreadPoolExecutor(3) as pool, TeacherClient(server.endpoint) as client:
        asked = [pool.submit(client.fetch, PLAN, token_samples(1, 20, prefix=name)) for name in "abc"]
        wait_until(lambda: len(engine.begun) == at_once and server.server.state.load()["queued_samples"] == 3 - at_once)
        assert len(engine.begun) == at_once
        engine.gate.set()
        assert all(isinstance(one.result()[0], EncodedSampleKV) for one in asked)
    assert len(engine.begun) == 3

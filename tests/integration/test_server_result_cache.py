"""A whole server with a cache of results: several callers, repeated samples, and an engine that breaks."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch

from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.types import EncodedSampleKV
from kvcore.wire.stream_reader import RefusedSample
from student_trainer.kv_sources.remote import RemoteSource
from teacher_server.engines.base import LayerSink, TokenizedSample
from teacher_server.engines.fake import FakeEngine, FakeModel
from tests.support.kv_maps import coded_map
from tests.support.server_in_thread import CONFIG, ServerInThread
from tests.support.servers import Outcome, TeacherClient, token_samples, wait_until

PLAN = KVPlan(layers=(0, 1), selection=Selection(selector="right", budget=8, span="all"), codec=CodecSpec(name="int8"))


class WaitingEngine(FakeEngine):
    """Records the samples that it computes, and waits for its gate, which is open at first."""

    def __init__(self) -> None:
        super().__init__(CONFIG, FakeModel(layers=2))
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False
        self.computed: list[str] = []

    def prefill(
        self, batch: Sequence[TokenizedSample], layers: Sequence[int], with_importance: bool, sink: LayerSink
    ) -> None:
        if self.broken:
            raise RuntimeError("out of memory")
        self.computed += [tokens.sample.id for tokens in batch]
        assert self.gate.wait(60)
        super().prefill(batch, layers, with_importance, sink)


@pytest.fixture
def engine() -> WaitingEngine:
    return WaitingEngine()


@pytest.fixture
def server(engine: WaitingEngine) -> Iterator[ServerInThread]:
    one = ServerInThread(lambda _config: engine, CONFIG.model_copy(update={"cache_bytes": 1 << 20}))
    yield one
    engine.gate.set()
    one.stop()


def contents(outcomes: Sequence[Outcome]) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for one in outcomes:
        assert isinstance(one, EncodedSampleKV)
        parts = {name: part.contiguous().view(torch.uint8).numpy().tobytes() for name, part in one.parts.items()}
        tensors = [part.tolist() for part in (one.positions, one.token_ids_T, one.byte_ends_T)]
        found.append((one.sample_id, one.key, parts, tensors, one.relative_error))
    return found


def metric(server: ServerInThread, name: str) -> float:
    lines = server.get("/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"kvdistill_{name} "))


def test_callers_that_ask_for_the_same_samples_at_the_same_time_share_one_computation(
    server: ServerInThread, engine: WaitingEngine
) -> None:
    samples = token_samples(4, 40)
    server.wait_ready()
    engine.computed.clear()
    engine.gate.clear()
    tokens = metric(server, "tokens_total")
    with ThreadPoolExecutor(3) as pool, TeacherClient(server.endpoint) as a, TeacherClient(server.endpoint) as b:
        asked = [pool.submit(client.fetch, PLAN, samples) for client in (a, b, a)]
        # One batch runs; the samples of the others wait for it.
        wait_until(lambda: server.server.state.load()["queued_tokens"] == 3 * 4 * 40)
        engine.gate.set()
        answers = [contents(one.result()) for one in asked]
        again = contents(a.fetch(PLAN, samples))
    assert answers[0] == answers[1] == answers[2] == again
    assert sorted(engine.computed) == ["n0", "n1", "n2", "n3"]
    assert metric(server, "tokens_total") == tokens + 4 * 40
    # The self-test's sample counts too.
    assert (metric(server, "cache_hits_total"), metric(server, "cache_misses_total")) == (12, 5)
    assert metric(server, "cache_bytes") > 0


def test_a_kept_answer_is_the_computed_one(server: ServerInThread) -> None:
    without = ServerInThread(lambda _config: FakeEngine(CONFIG, FakeModel(layers=2)))
    try:
        for one in (server, without):
            one.wait_ready()
        with TeacherClient(server.endpoint) as client, TeacherClient(without.endpoint) as other:
            samples = [*token_samples(2, 40), *token_samples(2, 50, prefix="longer")]
            first, kept = (contents(client.fetch(PLAN, samples)) for _ in range(2))
            assert first == kept == contents(other.fetch(PLAN, samples))
    finally:
        without.stop()


def test_a_kept_answer_in_the_codec_pca_is_the_computed_one(server: ServerInThread, engine: WaitingEngine) -> None:
    server.wait_ready()
    kv_map = coded_map(PLAN.layers, engine.info.kv_heads, engine.info.head_dim)
    plan = PLAN.with_map(kv_map.named, CodecSpec(name="pca"))
    with closing(RemoteSource("a", server.endpoint, lambda _info: plan, kv_map=kv_map)) as source:
        source.connect()
        engine.computed.clear()
        first, kept = (source.fetch(token_samples(3, 40)) for _ in range(2))
    assert engine.computed == ["n0", "n1", "n2"]
    for one, other in zip(first, kept, strict=True):
        assert isinstance(one, EncodedSampleKV)
        assert isinstance(other, EncodedSampleKV)
        assert one.parts.keys() == other.parts.keys()
        assert all(torch.equal(part, other.parts[name]) for name, part in one.parts.items())
        assert (one.key, one.relative_error) == (other.key, other.relative_error)


def test_the_self_test_of_a_broken_engine_is_not_answered_from_the_cache(
    server: ServerInThread, engine: WaitingEngine
) -> None:
    server.wait_ready()
    engine.broken = True
    with TeacherClient(server.endpoint) as client:
        (refused,) = client.fetch(PLAN, token_samples(1, 40))
        assert isinstance(refused, RefusedSample)
        wait_until(lambda: server.get("/readyz").status_code == 503)

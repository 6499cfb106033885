"""Maps over real gRPC: a client sends its map when a server does not hold it, and gets mapped K/V."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import torch

from kvcore.errors import TeacherRefusedError, TeacherUnavailableError
from kvcore.plan import CodecSpec, KVPlan, SamplingParams, Selection
from kvcore.tensors.codec import decode
from kvcore.tensors.kv_map import KVMap
from kvcore.types import TENSORS, EncodedSampleKV, Sample, Span, TeacherInfo
from kvcore.wire import messages
from protos import kv_cache_pb2 as pb
from student_trainer.kv_sources.base import KVResult
from student_trainer.kv_sources.completions import CompletionSource
from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.kv_sources.remote import RemoteSource
from teacher_server.config import ServeConfig
from teacher_server.engines import load_engine
from tests.support.kv_fakes import INFO, PLAN
from tests.support.kv_maps import naive_mapped, random_map
from tests.support.scripted_teacher import ScriptedTeacher
from tests.support.server_in_thread import ServerInThread
from tests.support.servers import refused

LAYERS, FEATURES = (0, 2), 2 * 16
KV_MAP = random_map(LAYERS, FEATURES, head_dim=5)
SAMPLES = [
    Sample(f"q{n}", text=f"Start at {n}. One and two is three, or {n}. Answer: 3", spans=(Span("reasoning", 12, 36),))
    for n in range(10, 15)
]


def unmapped_plan(info: TeacherInfo | None = None, codec: str = "raw") -> KVPlan:
    del info
    selection = Selection(selector="keydiff", budget=5)
    return KVPlan(layers=LAYERS, selection=selection, codec=CodecSpec.model_validate({"name": codec}))


def mapped_plan(info: TeacherInfo | None = None) -> KVPlan:
    return unmapped_plan(info).with_map(KV_MAP.named)


def started(port: int = 0, **settings: Any) -> ServerInThread:
    config = ServeConfig(model="fake:layers=3", engine="fake", grpc_port=port, drain_seconds=0.2, **settings)
    server = ServerInThread(load_engine, config)
    server.wait_ready()
    return server


@pytest.fixture
def server() -> Iterator[ServerInThread]:
    running = started()
    yield running
    running.stop()


@contextlib.contextmanager
def connected(*servers: ServerInThread | str, kv_map: KVMap | None = KV_MAP) -> Iterator[FailoverSource]:
    plan = unmapped_plan if kv_map is None else mapped_plan
    endpoints = [server if isinstance(server, str) else server.endpoint for server in servers]
    remotes = [RemoteSource("math", endpoint, plan, 20.0, 5.0, kv_map=kv_map) for endpoint in endpoints]
    source = FailoverSource("math", remotes, patience_s=10.0)
    try:
        source.connect()
        yield source
    finally:
        source.close()


def loads(server: ServerInThread) -> float:
    """`LoadMap` calls that succeeded."""
    labels = {"method": "LoadMap", "code": "OK"}
    registry = server.server.state.metrics.registry
    return registry.get_sample_value("kvdistill_requests_total", labels) or 0.0


def assert_mapped(found: list[KVResult], whole: list[KVResult]) -> None:
    """Every sample has the same tokens as in `whole`, and the mapped K/V of a naive map in fp64."""
    for mapped, other in zip(found, whole, strict=True):
        assert isinstance(mapped, EncodedSampleKV)
        assert isinstance(other, EncodedSampleKV)
        assert mapped.key != other.key
        assert mapped.positions.equal(other.positions)
        for kind in TENSORS:
            x_LHMD = decode({"data": other.parts[f"{kind}.data"]}, kind, other.codec)
            y_LHMD = decode({"data": mapped.parts[f"{kind}.data"]}, kind, mapped.codec)
            for place, layer in enumerate(LAYERS):
                expected = naive_mapped(KV_MAP, x_LHMD[place], layer, kind)
                torch.testing.assert_close(y_LHMD[place].double(), expected, atol=1e-5, rtol=1e-5)


def test_mapped_kv_equal_a_naive_map_of_the_whole_kv_and_the_map_is_sent_once(server: ServerInThread) -> None:
    with connected(server, kv_map=None) as source:
        whole = source.fetch(SAMPLES)
    with connected(server) as source, connected(server) as another:
        assert_mapped(source.fetch(SAMPLES), whole)
        assert_mapped(source.fetch(SAMPLES[:2]), whole[:2])
        assert_mapped(another.fetch(SAMPLES), whole)
    assert loads(server) == 1


def test_a_map_larger_than_a_message_is_sent_in_pieces(server: ServerInThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student_trainer.kv_sources.remote.MAP_PIECE_BYTES", 100)
    with connected(server) as source:
        assert all(isinstance(result, EncodedSampleKV) for result in source.fetch(SAMPLES))


def test_a_restarted_server_is_sent_the_map_again() -> None:
    first = started()
    port = first.server.state.grpc_port
    with connected(first, kv_map=None) as source:
        whole = source.fetch(SAMPLES)
    with connected(first) as source:
        assert_mapped(source.fetch(SAMPLES), whole)
        first.stop()
        again = started(port)
        try:
            assert_mapped(source.fetch(SAMPLES), whole)
            assert loads(again) == 1
        finally:
            again.stop()


def test_a_replica_that_lacks_the_map_is_sent_it() -> None:
    first, second = started(), started()
    try:
        with connected(first, kv_map=None) as source:
            whole = source.fetch(SAMPLES)
        with connected(first, second) as source:
            assert_mapped(source.fetch(SAMPLES), whole)
            first.stop()
            assert_mapped(source.fetch(SAMPLES), whole)
            assert source.switches == 1
        assert loads(second) == 1
    finally:
        first.stop()
        second.stop()


def test_completions_are_mapped_too(server: ServerInThread) -> None:
    sampling = SamplingParams(max_new_tokens=40)
    prompts = [Sample("p", text="Add some numbers.")]
    found: list[EncodedSampleKV] = []
    for plan, kv_map in ((unmapped_plan, None), (mapped_plan, KV_MAP)):
        source = CompletionSource("math", server.endpoint, plan, sampling, kv_map=kv_map)
        source.connect()
        (completed,) = source.complete(prompts)
        source.close()
        assert isinstance(completed.kv, EncodedSampleKV), completed.kv
        found.append(completed.kv)
    assert_mapped([found[1]], [found[0]])


# ---------------------------------------------------------------------------------------------------- refusals


def test_a_server_without_maps_is_refused_before_any_request() -> None:
    teacher = ScriptedTeacher(dataclasses.replace(INFO, max_map_bytes=0))
    kv_map = random_map(PLAN.layers, FEATURES)
    source = RemoteSource("math", teacher.endpoint, lambda _: PLAN.with_map(kv_map.named), kv_map=kv_map)
    try:
        with pytest.raises(TeacherRefusedError, match=r"does not support maps; update it.*align.basis_rank"):
            source.connect()
        assert not teacher.requests
    finally:
        source.close()
        teacher.stop()


def test_a_map_that_is_too_large_for_a_server_is_refused_with_both_sizes() -> None:
    small = started(max_map_bytes=100)
    try:
        refuses = pytest.raises(TeacherRefusedError, match=r"takes maps of up to 100 bytes.*the map has \d+ bytes")
        with refuses, connected(small):
            pass
    finally:
        small.stop()


def test_a_map_of_another_teacher_is_refused_by_the_name_of_its_tensor(server: ServerInThread) -> None:
    wrong = random_map(LAYERS, FEATURES + 1)
    source = RemoteSource("math", server.endpoint, lambda _: unmapped_plan().with_map(wrong.named), kv_map=wrong)
    source.connect()
    with pytest.raises(TeacherRefusedError, match=r"map.k.centre: has 33 features; this teacher has 32"):
        source.fetch(SAMPLES)
    source.close()


def test_a_server_that_forgets_the_map_at_once_counts_as_unavailable(
    server: ServerInThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(server.server.state.maps), "add", lambda *_: None)
    source = RemoteSource("math", server.endpoint, mapped_plan, kv_map=KV_MAP)
    source.connect()
    with pytest.raises(TeacherUnavailableError, match="does not keep the map that it was sent"):
        source.fetch(SAMPLES)
    source.close()


def test_the_service_tells_that_it_does_not_hold_a_map(server: ServerInThread) -> None:
    request = pb.KVRequest(request_id="r")
    with grpc.insecure_channel(server.endpoint) as channel:
        call = channel.unary_stream("/kvcache.v1.TeacherKV/StreamKV", pb.KVRequest.SerializeToString)
        request.plan.CopyFrom(messages.plan_to_proto(mapped_plan()))
        request.samples.append(messages.sample_to_proto(SAMPLES[0]))
        refusal = refused(lambda: list(call(request, timeout=20)))
    assert refusal.code is grpc.StatusCode.NOT_FOUND
    assert KV_MAP.named.digest in refusal.details

"""Tests of tracing: a collector receives the spans of a request from the trainer and from the server process."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from kvcore.errors import TeacherRefusedError
from kvcore.monitoring import tracing
from kvcore.plan import KVPlan, SamplingParams, Selection
from kvcore.types import Sample, TeacherInfo
from student_trainer.kv_sources.completions import CompletionSource
from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.kv_sources.remote import PlanFactory, RemoteSource
from tests.support.otlp_collector import Collector, ReceivedSpan, otlp_collector
from tests.support.servers import TeacherProcess, running_teacher, token_samples, wait_until

FAKE = "fake:layers=3,heads=2,dim=16,delay_ms=2"
STREAM = "kvcache.v1.TeacherKV/StreamKV"
SAMPLES = token_samples(3, 12)
IDS = [sample.id for sample in SAMPLES]


def plan_for(_: TeacherInfo) -> KVPlan:
    return KVPlan(layers=(0, 2), selection=Selection(selector="right", budget=4, span="all"))


def unknown_layer(_: TeacherInfo) -> KVPlan:
    return KVPlan(layers=(99,), selection=Selection(selector="right", budget=4, span="all"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with otlp_collector() as received, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", received.url)
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield received


@pytest.fixture(scope="module")
def server(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    with running_teacher(FAKE, tmp_path_factory.mktemp("server") / "log", engine="fake", name="ada") as running:
        yield running


@contextlib.contextmanager
def traced_alone(collector: Collector, method: str, calls: int = 1) -> Iterator[None]:
    """Trace this process inside the block, then wait for the server's spans of all calls."""
    collector.spans.clear()
    stop = tracing.start("kvdistill-trainer", "rank0")
    try:
        yield
    finally:
        stop()
    wait_until(lambda: len(collector.named(f"kvcache.v1.TeacherKV/{method}", "SERVER")) == calls)


def fetch(server: TeacherProcess, plan_maker: PlanFactory = plan_for) -> None:
    """Fetch with two replicas, the first of them dead. One more call compares the replicas."""
    endpoints = [f"127.0.0.1:{free_port()}", server.endpoint]
    source = FailoverSource("ada", [RemoteSource("ada", one, plan_maker) for one in endpoints], patience_s=10.0)
    with contextlib.closing(source):
        source.connect()
        source.fetch(SAMPLES)


def only(spans: list[ReceivedSpan]) -> ReceivedSpan:
    assert len(spans) == 1, spans
    return spans[0]


def test_a_sample_is_traced_from_the_trainer_through_the_server(collector: Collector, server: TeacherProcess) -> None:
    with traced_alone(collector, "StreamKV", calls=2):
        fetch(server)
    top = next(span for span in collector.named("kv.fetch") if span.attributes["kvdistill.sample_ids"] == IDS)
    assert (top.service, top.instance, top.parent) == ("kvdistill-trainer", "rank0", "")
    client = only(collector.below(top))
    assert (client.service, client.kind, client.name) == ("kvdistill-trainer", "CLIENT", STREAM)
    assert client.attributes["kvdistill.sample_ids"] == IDS
    answer = only(collector.below(client))
    assert (answer.service, answer.instance.split("@")[0]) == ("kvdistill-teacher", "ada")
    assert (answer.kind, answer.name) == ("SERVER", STREAM)
    assert answer.attributes["rpc.grpc.status_code"] == 0
    assert answer.attributes["kvdistill.samples"] == 3
    assert answer.attributes["kvdistill.sent_bytes"] > 0
    stages = collector.below(answer)
    assert sorted(span.name for span in stages) == ["encode", "prefill", "queue", "send"]
    by_name = {span.name: span for span in stages}
    assert by_name["prefill"].attributes["kvdistill.sample_ids"] == IDS
    # The model takes 2 ms per layer.
    assert by_name["prefill"].ended - by_name["prefill"].began >= 4_000_000
    assert by_name["queue"].began <= by_name["queue"].ended < by_name["encode"].ended
    assert {span.trace for span in [client, answer, *stages]} == {top.trace}
    assert all(span.error is None for span in [top, client, answer, *stages])


def test_a_refusal_is_an_error_in_the_spans_of_trainer_and_server(collector: Collector, server: TeacherProcess) -> None:
    with traced_alone(collector, "StreamKV", calls=2), pytest.raises(TeacherRefusedError):
        fetch(server, unknown_layer)
    answer = only([span for span in collector.named(STREAM, "SERVER") if span.error])
    assert answer.attributes["rpc.grpc.status_code"] == 3
    assert answer.error is not None
    assert answer.error.startswith("INVALID_ARGUMENT: plan.layers")
    client = only(collector.named(STREAM, "CLIENT"))
    assert (client.trace, client.id) == (answer.trace, answer.parent)
    assert client.error is not None
    assert "plan.layers" in client.error


def test_generation_is_a_separate_stage(collector: Collector, server: TeacherProcess) -> None:
    writer = CompletionSource("ada", server.endpoint, plan_for, SamplingParams(max_new_tokens=8))
    with traced_alone(collector, "Generate"), contextlib.closing(writer):
        writer.connect()
        writer.complete([Sample("p0", text="1 + 2 = ")])
    call = only(collector.named("kvcache.v1.TeacherKV/Generate", "SERVER"))
    assert call.parent == only(collector.named("kvcache.v1.TeacherKV/Generate", "CLIENT")).id
    stages = [span.name for span in collector.below(call) if span.attributes.get("kvdistill.sample_ids") == ["p0"]]
    assert stages == ["queue", "write", "queue", "prefill", "encode"]


def test_a_call_without_a_trace_starts_a_trace_at_the_server(collector: Collector, server: TeacherProcess) -> None:
    collector.spans.clear()
    fetch(server)
    wait_until(lambda: bool(collector.named(STREAM, "SERVER")))
    assert {span.service for span in collector.spans} == {"kvdistill-teacher"}
    assert only(collector.named(STREAM, "SERVER")).parent == ""

"""A request is followed from the trainer's side through a server process, as a collector sees it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcore import tracing
from kvcore.errors import TeacherRefusedError
from kvcore.plan import KVPlan, Selection
from kvcore.types import TeacherInfo
from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.kv_sources.remote import RemoteSource
from tests.support.otlp_collector import Collector, ReceivedSpan, otlp_collector
from tests.support.servers import running_teacher, token_samples

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


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with otlp_collector() as received:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", received.url)
        yield received


def fetched(tmp_path: Path, plan_maker=plan_for) -> None:
    """Fetches through a replica that is dead and one that answers; everything is sent when this returns."""
    with running_teacher(FAKE, tmp_path / "log", engine="fake", name="ada") as server:
        stop = tracing.start("kvdistill-trainer", "rank0")
        endpoints = [f"127.0.0.1:{free_port()}", server.endpoint]
        source = FailoverSource("ada", [RemoteSource("ada", one, plan_maker) for one in endpoints], patience_s=10.0)
        try:
            source.connect()
            source.fetch(SAMPLES)
        finally:
            source.close()
            stop()


def only(spans: list[ReceivedSpan]) -> ReceivedSpan:
    assert len(spans) == 1, spans
    return spans[0]


def test_a_sample_is_followed_from_the_trainer_through_the_server(collector: Collector, tmp_path: Path) -> None:
    fetched(tmp_path)
    fetch = next(span for span in collector.named("kv.fetch") if span.attributes["kvdistill.sample_ids"] == IDS)
    assert (fetch.service, fetch.instance, fetch.parent) == ("kvdistill-trainer", "rank0", "")
    client = only(collector.below(fetch))
    assert (client.service, client.kind, client.name) == ("kvdistill-trainer", "CLIENT", STREAM)
    assert client.attributes["kvdistill.sample_ids"] == IDS
    server = only(collector.below(client))
    assert (server.service, server.instance.split("@")[0]) == ("kvdistill-teacher", "ada")
    assert (server.kind, server.name) == ("SERVER", STREAM)
    assert server.attributes["rpc.grpc.status_code"] == 0
    assert server.attributes["kvdistill.samples"] == 3
    assert server.attributes["kvdistill.sent_bytes"] > 0
    stages = collector.below(server)
    assert sorted(span.name for span in stages) == ["encode", "prefill", "queue", "send"]
    by_name = {span.name: span for span in stages}
    assert by_name["prefill"].attributes["kvdistill.sample_ids"] == IDS
    # The model takes 2 ms a layer.
    assert by_name["prefill"].ended - by_name["prefill"].began >= 4_000_000
    assert by_name["queue"].began <= by_name["queue"].ended < by_name["encode"].ended
    assert {span.trace for span in [client, server, *stages]} == {fetch.trace}
    assert all(span.error is None for span in [fetch, client, server, *stages])


def test_a_refusal_is_an_error_on_both_sides_of_one_trace(collector: Collector, tmp_path: Path) -> None:
    with pytest.raises(TeacherRefusedError):
        fetched(tmp_path, unknown_layer)
    server = only(collector.named(STREAM, "SERVER"))
    assert server.attributes["rpc.grpc.status_code"] == 3
    assert server.error is not None
    assert server.error.startswith("INVALID_ARGUMENT: plan.layers")
    client = only(collector.named(STREAM, "CLIENT"))
    assert (client.trace, client.id) == (server.trace, server.parent)
    assert client.error is not None
    assert "plan.layers" in client.error


def test_without_the_environment_asking_nothing_is_sent(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    fetched(tmp_path)
    assert collector.spans == []

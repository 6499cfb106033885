"""Tests of tracing: when spans are exported, and the errors for unsupported settings."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from kvcore.errors import ConfigError
from kvcore.monitoring import tracing
from tests.support.otlp_collector import Collector, otlp_collector


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*tracing.ENDPOINTS, *tracing.PROTOCOLS, tracing.EXPORTER, "OTEL_SDK_DISABLED", "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with otlp_collector() as received:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", received.url)
        yield received


def send_spans() -> tuple[tuple[str, str], ...]:
    stop = tracing.start("trainer", "rank3")
    with tracing.span("outer"), tracing.span("inner", attributes={"kvdistill.samples": 2}):
        headers = tracing.headers()
    stop()
    return headers


def test_spans_are_exported_if_an_endpoint_is_set(collector: Collector) -> None:
    [(key, value)] = send_spans()
    outer, inner = collector.named("outer")[0], collector.named("inner")[0]
    assert (inner.trace, inner.parent) == (outer.trace, outer.id)
    assert (key, value.rpartition("-")[0]) == ("traceparent", f"00-{inner.trace}-{inner.id}")
    assert (inner.service, inner.instance, inner.attributes) == ("trainer", "rank3", {"kvdistill.samples": 2})


def test_tracing_is_off_by_default() -> None:
    assert send_spans() == ()
    with tracing.span("outer") as span:
        assert not span.is_recording()


@pytest.mark.parametrize(("name", "value"), [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")])
def test_standard_variables_disable_tracing(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert send_spans() == ()
    assert collector.spans == []


def test_service_name_and_sampler_can_be_set(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "night-run")
    send_spans()
    assert {span.service for span in collector.spans} == {"night-run"}
    collector.spans.clear()
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    send_spans()
    assert collector.spans == []


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "OTEL_EXPORTER_OTLP_PROTOCOL: got 'grpc'.*http/protobuf"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "OTEL_TRACES_EXPORTER: got 'zipkin'"),
    ],
)
def test_unsupported_exporter_or_protocol_is_refused(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, name: str, value: str, problem: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=problem):
        tracing.start("trainer")


def test_missing_sdk_error_names_the_extra_to_install(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT asks for traces.*install 'kvdistill\[otel\]'"):
        tracing.start("trainer")


def test_exception_is_recorded_in_its_span_and_propagates(collector: Collector) -> None:
    stop = tracing.start("trainer")
    with pytest.raises(ValueError, match="no such layer"), tracing.span("outer"):
        raise ValueError("no such layer")
    stop()
    assert collector.named("outer")[0].error == "ValueError: no such layer"


def test_add_span_keeps_the_measured_duration(collector: Collector) -> None:
    stop = tracing.start("trainer")
    with tracing.span("outer") as span:
        tracing.add_span("earlier", span, 10.0, 12.5)
    stop()
    earlier = collector.named("earlier")[0]
    assert earlier.ended - earlier.began == pytest.approx(2.5e9, rel=1e-6)
    assert earlier.parent == collector.named("outer")[0].id

"""When traces are sent, and what is said if they cannot be."""

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


def traced() -> tuple[tuple[str, str], ...]:
    stop = tracing.start("trainer", "rank3")
    with tracing.span("outer"), tracing.span("inner", attributes={"kvdistill.samples": 2}):
        carried = tracing.headers()
    stop()
    return carried


def test_spans_are_sent_when_an_endpoint_is_named(collector: Collector) -> None:
    [(key, value)] = traced()
    outer, inner = collector.named("outer")[0], collector.named("inner")[0]
    assert (inner.trace, inner.parent) == (outer.trace, outer.id)
    assert (key, value.rpartition("-")[0]) == ("traceparent", f"00-{inner.trace}-{inner.id}")
    assert (inner.service, inner.instance, inner.attributes) == ("trainer", "rank3", {"kvdistill.samples": 2})


def test_nothing_is_recorded_or_carried_unless_asked_for() -> None:
    assert traced() == ()
    with tracing.span("outer") as span:
        assert not span.is_recording()


@pytest.mark.parametrize(("name", "value"), [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")])
def test_the_standard_switches_turn_it_off(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert traced() == ()
    assert collector.spans == []


def test_the_service_can_be_named_and_the_share_that_is_kept_can_be_set(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "night-run")
    traced()
    assert {span.service for span in collector.spans} == {"night-run"}
    collector.spans.clear()
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    traced()
    assert collector.spans == []


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "OTEL_EXPORTER_OTLP_PROTOCOL: got 'grpc'.*http/protobuf"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "OTEL_TRACES_EXPORTER: got 'zipkin'"),
    ],
)
def test_a_way_that_is_not_offered_is_refused(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=says):
        tracing.start("trainer")


def test_traces_without_the_sdk_say_what_to_install(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT asks for traces.*install 'kvdistill\[otel\]'"):
        tracing.start("trainer")


def test_an_error_marks_its_span_and_goes_on(collector: Collector) -> None:
    stop = tracing.start("trainer")
    with pytest.raises(ValueError, match="no such layer"), tracing.span("outer"):
        raise ValueError("no such layer")
    stop()
    assert collector.named("outer")[0].error == "ValueError: no such layer"


def test_what_was_measured_before_becomes_a_span_of_its_length(collector: Collector) -> None:
    stop = tracing.start("trainer")
    with tracing.span("outer") as span:
        tracing.add_span("earlier", span, 10.0, 12.5)
    stop()
    earlier = collector.named("earlier")[0]
    assert earlier.ended - earlier.began == pytest.approx(2.5e9, rel=1e-6)
    assert earlier.parent == collector.named("outer")[0].id

"""OpenTelemetry traces that follow a request from the trainer through a teacher server.

Off unless one of OpenTelemetry's environment variables (such as `OTEL_EXPORTER_OTLP_ENDPOINT`) turns them on; these
variables also set the destination, the sampling and the service name. While off, a span costs microseconds and nothing
is sent.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping

from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN, NoOpTracer, Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kvcore.errors import ConfigError
from kvcore.extras import needs

Attributes = Mapping[str, str | int | float | bool | list[str]]

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
EXPORTER = "OTEL_TRACES_EXPORTER"
# The most sample ids on one span.
MOST_IDS = 64

_propagator = TraceContextTextMapPropagator()
_off: Tracer = NoOpTracer()
_tracer: Tracer = _off


def start(service: str, instance: str = "") -> Callable[[], None]:
    """Starts to export spans if the environment asks for it.

    Args:
        service: `service.name` of this process, unless OTEL_SERVICE_NAME sets it.
        instance: distinguishes processes of one service.

    Returns:
        A function that sends the last spans and stops the export; it does nothing if tracing is off.

    Raises:
        ConfigError: the SDK is not installed, or does not support the requested export.
    """
    global _tracer  # noqa: PLW0603  one process has one tracer, as in OpenTelemetry
    if not _asked_for():
        return lambda: None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415  an extra
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"{_asked_for()} asks for traces, which {needs('otel', str(error.name))}, or unset it"
        ) from error
    named = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    own = ({} if named else {"service.name": service}) | ({"service.instance.id": instance} if instance else {})
    # Not the global provider: other libraries would add spans of every scrape to it.
    provider = TracerProvider(resource=Resource.create(dict(own)), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = provider.get_tracer("kvdistill")

    def stop() -> None:
        global _tracer  # noqa: PLW0603
        _tracer = _off
        provider.shutdown()

    return stop


def _asked_for() -> str | None:
    """Returns the name of the variable that turns tracing on, or None.

    Raises:
        ConfigError: an exporter or protocol that is not supported.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    exporter = os.environ.get(EXPORTER, "")
    if exporter == "none":
        return None
    if exporter not in ("", "otlp"):
        raise ConfigError(f"{EXPORTER}: got '{exporter}'; only 'otlp' is supported, and 'none' turns traces off")
    asking = EXPORTER if exporter else next((name for name in ENDPOINTS if os.environ.get(name)), None)
    protocol = next((name for name in PROTOCOLS if os.environ.get(name)), None)
    if asking and protocol and os.environ[protocol] != "http/protobuf":
        raise ConfigError(f"{protocol}: got '{os.environ[protocol]}'; only 'http/protobuf' is supported (port 4318)")
    return asking


@contextlib.contextmanager
def span(
    name: str,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Attributes | None = None,
    headers: Iterable[tuple[str, str | bytes]] | None = None,
) -> Generator[Span, None, None]:
    """A span around a block, as a child of the current span of this thread or task; an error marks it as failed.

    Args:
        name: of the span.
        kind: which side of a call.
        attributes: of the span.
        headers: metadata of a received call; its `traceparent` is the parent.
    """
    if _tracer is _off:
        yield INVALID_SPAN
        return
    parent = None if headers is None else _propagator.extract(_texts(headers))
    with _tracer.start_as_current_span(
        name, parent, kind, dict(attributes or {}), record_exception=False, set_status_on_exception=False
    ) as opened:
        try:
            yield opened
        except Exception as error:
            # The interceptor sets the status of a server's call from its answer.
            if kind is not SpanKind.SERVER:
                fail(opened, f"{type(error).__name__}: {error}")
            raise


def current() -> Span:
    """The current span of this thread or task."""
    return trace.get_current_span()


def headers() -> tuple[tuple[str, str], ...]:
    """Metadata for a call, so that the other side's spans become children of the current one."""
    carrier: dict[str, str] = {}
    if _tracer is not _off:
        _propagator.inject(carrier)
    return tuple(carrier.items())


def add_span(name: str, parent: Span, began: float, ended: float, attributes: Attributes | None = None) -> None:
    """Adds a span whose times were measured earlier.

    Args:
        name: of the span.
        parent: its parent span.
        began: by `time.perf_counter`.
        ended: by `time.perf_counter`.
        attributes: of the span.
    """
    if _tracer is _off or not parent.is_recording():
        return
    # Nanoseconds since 1970 do not fit exactly into a float.
    epoch = time.time_ns() - time.perf_counter_ns()
    child = _tracer.start_span(
        name,
        trace.set_span_in_context(parent),
        attributes=dict(attributes or {}),
        start_time=epoch + int(began * 1e9),
    )
    child.end(epoch + int(max(began, ended) * 1e9))


def fail(opened: Span, problem: str) -> None:
    """Marks a span as failed."""
    opened.set_status(Status(StatusCode.ERROR, problem))


def id_list(ids: Iterable[str]) -> list[str]:
    """The first sample ids, as an attribute."""
    return list(ids)[:MOST_IDS]


def _texts(headers: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
    return {key: value for key, value in headers if isinstance(value, str)}

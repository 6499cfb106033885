"""OpenTelemetry spans of a call: one for the call, and below it one per stage that its samples go through."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterable, Sequence

import grpc
from opentelemetry.trace import Span, SpanKind

from kvcore.monitoring import tracing
from kvcore.types import Timings
from teacher_server.monitoring.activity import Call
from teacher_server.sample_queue import Job

_ATTRIBUTES = ("request_id", "codec", "samples", "failed_samples", "tokens", "frames", "sent_bytes")


@contextlib.contextmanager
def traced(call: Call, service: str, headers: Iterable[tuple[str, str | bytes]]) -> Generator[None, None, None]:
    """Open a span around a call, as a child of the caller's span if it sent one.

    Args:
        call: its record, filled in while it runs.
        service: full name.
        headers: the call's metadata.
    """
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": call.method}
    with tracing.span(f"{service}/{call.method}", SpanKind.SERVER, attributes, headers) as span:
        try:
            yield
        finally:
            _describe(span, call)


def _describe(span: Span, call: Call) -> None:
    if not span.is_recording():
        return
    span.set_attribute("rpc.grpc.status_code", grpc.StatusCode[call.code].value[0])
    span.set_attribute("network.peer.address", call.peer)
    span.set_attributes({f"kvdistill.{name}": getattr(call, name) for name in _ATTRIBUTES})
    if call.code != grpc.StatusCode.OK.name:
        tracing.fail(span, f"{call.code}: {call.problem}")
    if call.first_frame_s is not None:
        tracing.add_span("send", span, call.started + call.first_frame_s, time.perf_counter())


def add_batch(call_span: Span, done: Sequence[Job], timings: Sequence[Timings]) -> None:
    """Add the spans of one batch of a call's samples: queue, prefill and encode.

    Prefill and encoding alternate layer by layer. Each span is as long as its share of the time: `prefill` from the
    batch's start, `encode` up to its end.
    """
    if not done or not call_span.is_recording():
        return
    spent, ended = timings[0], time.perf_counter()
    started, attributes = _add_queue(call_span, done)
    tracing.add_span("prefill", call_span, started, started + spent.prefill, attributes)
    tracing.add_span("encode", call_span, ended - spent.encode, ended, attributes)


def add_generation(call_span: Span, prompts: Sequence[Job], seconds: float) -> None:
    """Add the spans of one batch of a call's prompts: queue and write."""
    if call_span.is_recording():
        started, attributes = _add_queue(call_span, prompts)
        tracing.add_span("write", call_span, started, started + seconds, attributes)


def _add_queue(call_span: Span, jobs: Sequence[Job]) -> tuple[float, tracing.Attributes]:
    """Add the queue span of a batch; returns when it ended, and the attributes of the batch's spans."""
    attributes: tracing.Attributes = {
        "kvdistill.samples": len(jobs),
        "kvdistill.tokens": sum(job.tokens for job in jobs),
        "kvdistill.sample_ids": tracing.id_list(job.planned.tokens.sample.id for job in jobs),
    }
    started = max(job.ready_at + job.waited for job in jobs)
    tracing.add_span("queue", call_span, min(job.ready_at for job in jobs), started, attributes)
    return started, attributes

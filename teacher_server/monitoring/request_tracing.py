"""What a traced call shows of itself: one span for the call, and below it where its samples' time went."""

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


@contextlib.contextmanager
def traced(call: Call, service: str, headers: Iterable[tuple[str, str | bytes]]) -> Generator[None, None, None]:
    """A span around a call, below the caller's if it sent one.

    Args:
        call: filled in while it runs.
        service: full name with a slash behind.
        headers: the call's metadata.
    """
    beforehand = {"rpc.system": "grpc", "rpc.service": service.rstrip("/"), "rpc.method": call.method}
    with tracing.span(f"{service}{call.method}", SpanKind.SERVER, beforehand, headers) as span:
        try:
            yield
        finally:
            _describe(span, call)


def _describe(span: Span, call: Call) -> None:
    if not span.is_recording():
        return
    span.set_attributes(
        {
            "rpc.grpc.status_code": grpc.StatusCode[call.code].value[0],
            "network.peer.address": call.peer,
            "kvdistill.request_id": call.request_id,
            "kvdistill.codec": call.codec,
            "kvdistill.samples": call.samples,
            "kvdistill.failed_samples": call.failed_samples,
            "kvdistill.tokens": call.tokens,
            "kvdistill.frames": call.frames,
            "kvdistill.sent_bytes": call.sent_bytes,
        }
    )
    if call.code != grpc.StatusCode.OK.name:
        tracing.fail(span, f"{call.code}: {call.problem}")
    if call.first_frame_s is not None:
        tracing.add_span("send", span, call.started + call.first_frame_s, time.perf_counter())


def add_batch(call_span: Span, done: Sequence[Job], timings: Sequence[Timings]) -> None:
    """Adds what one batch took of a call's samples: waiting, the model, encoding.

    The model and the encoder take turns layer by layer. Both spans are as long as their share; `prefill` is shown from
    the batch's start and `encode` up to its end.
    """
    if not done or not call_span.is_recording():
        return
    spent, ended = timings[0], time.perf_counter()
    taken, said = _add_queue(call_span, done)
    tracing.add_span("prefill", call_span, taken, taken + spent.prefill, said)
    tracing.add_span("encode", call_span, ended - spent.encode, ended, said)


def add_writing(call_span: Span, prompts: Sequence[Job], seconds: float) -> None:
    """Adds what one batch took of a call's prompts: waiting, and writing."""
    if call_span.is_recording():
        taken, said = _add_queue(call_span, prompts)
        tracing.add_span("write", call_span, taken, taken + seconds, said)


def _add_queue(call_span: Span, jobs: Sequence[Job]) -> tuple[float, tracing.Attributes]:
    """Adds the wait of a batch; returns when it ended, and what to say of the batch."""
    said: tracing.Attributes = {
        "kvdistill.samples": len(jobs),
        "kvdistill.tokens": sum(job.tokens for job in jobs),
        "kvdistill.sample_ids": tracing.id_list(job.planned.tokens.sample.id for job in jobs),
    }
    taken = max(job.ready_at + job.waited for job in jobs)
    tracing.add_span("queue", call_span, min(job.ready_at for job in jobs), taken, said)
    return taken, said

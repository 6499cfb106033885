"""The gRPC interceptor of TeacherKV: authenticates, maps errors to statuses, logs and counts calls."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

import grpc
import grpc.aio

from kvcore.errors import FieldError, KVDistillError
from teacher_server.monitoring.activity import Activity, Call
from teacher_server.monitoring.logs import LineLimit, log_event
from teacher_server.monitoring.metrics import Metrics
from teacher_server.monitoring.request_tracing import traced
from teacher_server.requests.authentication import Tokens, UnauthenticatedError, check_certificate, check_token
from teacher_server.requests.map_store import UnknownMapError
from teacher_server.requests.service_interceptor import Handler, ServiceInterceptor, with_request_stream
from teacher_server.sample_queue import BusyError
from teacher_server.state import NotReadyError

log = logging.getLogger(__name__)

PUSHBACK = "grpc-retry-pushback-ms"
MAX_DETAILS_BYTES = 1024
_LOGGED = (
    "method",
    "peer",
    "code",
    "problem",
    "samples",
    "failed_samples",
    "tokens",
    "frames",
    "sent_bytes",
    "shared_bytes",
)
Method = Callable[[grpc.aio.ServicerContext], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Status:
    """The status of a failed call. `trailers`: trailing metadata that tells the client when to retry."""

    code: grpc.StatusCode
    details: str
    trailers: tuple[tuple[str, str], ...] = ()


_CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (FieldError, grpc.StatusCode.INVALID_ARGUMENT),
    (UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
    (NotReadyError, grpc.StatusCode.UNAVAILABLE),
    (UnknownMapError, grpc.StatusCode.NOT_FOUND),
    (KVDistillError, grpc.StatusCode.FAILED_PRECONDITION),
)


def status_of(error: Exception) -> Status:
    """Map an error to a status. Callers see only an id of an unexpected error; the log has its traceback."""
    if isinstance(error, BusyError):
        return Status(grpc.StatusCode.RESOURCE_EXHAUSTED, _details(error), ((PUSHBACK, str(error.retry_ms)),))
    if isinstance(error, TimeoutError):
        return Status(
            grpc.StatusCode.DEADLINE_EXCEEDED, "the request ran longer than this server's max_request_seconds"
        )
    for kind, code in _CODES:
        if isinstance(error, kind):
            return Status(code, _details(error))
    error_id = uuid.uuid4().hex[:12]
    log_event(log, "internal_error", level=logging.ERROR, error=error, error_id=error_id)
    return Status(grpc.StatusCode.INTERNAL, f"internal error {error_id}; the server's log has the details")


def _details(error: Exception) -> str:
    """The message, cut to a size that every client accepts in trailing metadata, where a byte may take three."""
    data = str(error).encode(errors="replace")
    if len(data) <= MAX_DETAILS_BYTES:
        return data.decode()
    return f"{data[:MAX_DETAILS_BYTES].decode(errors='ignore')} ..."


class CallInterceptor(ServiceInterceptor):
    """Wraps the methods of one service.

    Args:
        service: full name of the service; calls of other services pass through.
        metrics, activity: of the server.
        tokens: that callers may present; None if no token is required.
        certificate_required: whether callers must have shown a certificate.
    """

    def __init__(
        self,
        service: str,
        metrics: Metrics,
        activity: Activity,
        tokens: Tokens | None = None,
        *,
        certificate_required: bool = False,
    ) -> None:
        super().__init__({service: self._handler})
        self._service = service
        self._metrics = metrics
        self._activity = activity
        self._tokens, self._certificate_required = tokens, certificate_required
        self._line_limit = LineLimit(log, "calls_not_logged")

    def _handler(self, path: str, handler: Any) -> Handler:
        method = cast("Method", handler.stream_stream if handler.response_streaming else handler.stream_unary)
        wrapped = self._wrap(method, path.rpartition("/")[2])
        return with_request_stream(handler, wrapped, handler.request_deserializer)

    def _wrap(self, method: Method, name: str) -> Callable[[object, grpc.aio.ServicerContext], Awaitable[Any]]:
        async def wrapped(_requests: object, context: grpc.aio.ServicerContext) -> Any:
            call, metadata = Call(name, context.peer()), context.invocation_metadata() or ()
            with self._activity.during(call), traced(call, self._service, metadata):
                try:
                    if self._certificate_required:
                        check_certificate(context.auth_context())
                    check_token(self._tokens, metadata)
                    return await method(context)
                except asyncio.CancelledError:
                    call.code = _code_of_cancelled(context).name
                    raise
                except Exception as error:  # noqa: BLE001  the boundary where every error becomes a status
                    status = status_of(error)
                    call.code, call.problem = status.code.name, status.details
                finally:
                    self._record(call)
                # Abort outside the `except` block: gRPC keeps the exception of `abort` in a reference cycle, and its
                # context would keep `error`, its frames and so the request alive until the next garbage collection.
                return await context.abort(status.code, status.details, status.trailers)

        return wrapped

    def _record(self, call: Call) -> None:
        seconds = time.perf_counter() - call.started
        metrics = self._metrics
        metrics.requests.labels(call.method, call.code).inc()
        if call.codec:
            metrics.sent_bytes.labels(call.codec).inc(call.sent_bytes)
            metrics.shared_bytes.inc(call.shared_bytes)
            metrics.request_tokens.labels(call.method, call.code).inc(call.tokens)
            metrics.duration.labels(call.method).observe(seconds)
            if call.first_frame_s is not None:
                metrics.first_frame.labels(call.method).observe(call.first_frame_s)
        failed = call.code != grpc.StatusCode.OK.name
        if failed and not call.frames and not self._line_limit.allow():
            return
        fields = {name: getattr(call, name) for name in _LOGGED}
        generated = call.generated_tokens
        log_event(log, "call", request=call.request_id, seconds=round(seconds, 6), written_tokens=generated, **fields)


def _code_of_cancelled(context: grpc.aio.ServicerContext) -> grpc.StatusCode:
    remaining = context.time_remaining()
    if remaining is not None and remaining <= 0:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED

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
from teacher_server.requests.authentication import UnauthenticatedError, check_token
from teacher_server.sample_queue import BusyError
from teacher_server.state import NotReadyError

log = logging.getLogger(__name__)

PUSHBACK = "grpc-retry-pushback-ms"
_LOGGED = ("method", "peer", "code", "problem", "samples", "failed_samples", "tokens", "frames", "sent_bytes")
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
    (KVDistillError, grpc.StatusCode.FAILED_PRECONDITION),
)


def status_of(error: Exception) -> Status:
    """Map an error to a status. Callers see only an id of an unexpected error; the log has its traceback."""
    if isinstance(error, BusyError):
        return Status(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), ((PUSHBACK, str(error.retry_ms)),))
    if isinstance(error, TimeoutError):
        return Status(
            grpc.StatusCode.DEADLINE_EXCEEDED, "the request ran longer than this server's max_request_seconds"
        )
    for kind, code in _CODES:
        if isinstance(error, kind):
            return Status(code, str(error))
    error_id = uuid.uuid4().hex[:12]
    log_event(log, "internal_error", level=logging.ERROR, error=error, error_id=error_id)
    return Status(grpc.StatusCode.INTERNAL, f"internal error {error_id}; the server's log has the details")


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of one service.

    Args:
        service: full name of the service; calls of other services pass through.
        metrics, activity: of the server.
        token: the token that callers must present; None if no token is required.
    """

    def __init__(self, service: str, metrics: Metrics, activity: Activity, token: bytes | None = None) -> None:
        self._prefix = f"/{service}/"
        self._metrics = metrics
        self._activity = activity
        self._token = token
        self._line_limit = LineLimit(log, "calls_not_logged")

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Called by gRPC for every call."""
        handler = await continuation(handler_call_details)
        path = handler_call_details.method
        if handler is None or not path.startswith(self._prefix):
            return handler
        streams = handler.response_streaming
        make = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
        method = cast("Method", handler.stream_stream if streams else handler.stream_unary)
        return make(
            self._wrap(method, path.removeprefix(self._prefix)),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _wrap(self, method: Method, name: str) -> Callable[[object, grpc.aio.ServicerContext], Awaitable[Any]]:
        async def wrapped(_requests: object, context: grpc.aio.ServicerContext) -> Any:
            call, metadata = Call(name, context.peer()), context.invocation_metadata() or ()
            with self._activity.during(call), traced(call, self._prefix[1:], metadata):
                try:
                    check_token(self._token, metadata)
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

"""Limits that apply before a caller is authenticated: connections, calls, health checks and reflection."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION_SERVICE

from teacher_server.config import ServeConfig

MAX_OPEN_PROBES = 64
MAX_PROBE_BYTES = 4096
PROBE_SECONDS = 5.0
# A reflection call may send any number of requests, each as large as gRPC allows.
MAX_OPEN_REFLECTIONS = 4
# gRPC limits the message size only for the whole server, so few probes are read at the same time.
PROBES_READ_AT_ONCE = 4


def max_streams(config: ServeConfig) -> int:
    """The most calls of one connection: a proxy may send all calls of the server, and probes, over one connection."""
    return config.max_streams + MAX_OPEN_PROBES


def max_calls(config: ServeConfig) -> int:
    """The most calls in progress over all services and connections; gRPC refuses further calls unread."""
    return config.max_streams + 4 * MAX_OPEN_PROBES


async def read_request(context: grpc.aio.ServicerContext) -> bytes:
    """Read the single request of a call that is registered with a request stream; empty if the caller sent none.

    Iterating over the request stream instead would keep its last message alive as long as the call.
    """
    data: Any = await context.read()
    return data if isinstance(data, bytes) else b""


class OpenServicesInterceptor(grpc.aio.ServerInterceptor):
    """Limits the services that need no token, health checks and reflection. Calls of other services pass through."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self._reading = asyncio.Semaphore(PROBES_READ_AT_ONCE)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Called by gRPC for every call."""
        handler = await continuation(handler_call_details)
        path = handler_call_details.method
        if handler is None:
            return None
        if path.startswith(f"/{HEALTH_SERVICE}/"):
            return self._probe(path, handler)
        if path.startswith(f"/{REFLECTION_SERVICE}/"):
            return self._reflection(path, handler)
        return handler

    def _probe(self, path: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        """The same method with its request as a stream, so that gRPC reads it only when the method asks for it."""
        streams = handler.response_streaming
        make = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
        method = handler.unary_stream if streams else handler.unary_unary

        async def probe(_requests: object, context: grpc.aio.ServicerContext) -> Any:
            async with self._counted(path, MAX_OPEN_PROBES, context):
                data = await self._read(context)
                if data is None:
                    problem = f"the request has more than {MAX_PROBE_BYTES} bytes, or took over {PROBE_SECONDS:g} s"
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
                return await method(handler.request_deserializer(data), context)

        return make(probe, response_serializer=handler.response_serializer)

    def _reflection(self, path: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        async def reflect(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async with self._counted(path, MAX_OPEN_REFLECTIONS, context):
                async for response in handler.stream_stream(requests, context):
                    yield response

        return grpc.stream_stream_rpc_method_handler(
            reflect,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    @contextlib.asynccontextmanager
    async def _counted(self, path: str, limit: int, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        if self._open[path] >= limit:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{limit} calls of {path} are open, the limit")
        self._open[path] += 1
        try:
            yield
        finally:
            self._open[path] -= 1

    async def _read(self, context: grpc.aio.ServicerContext) -> bytes | None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROBE_SECONDS), self._reading:
                data = await read_request(context)
                return data if len(data) <= MAX_PROBE_BYTES else None
        return None

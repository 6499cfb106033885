"""Limits that apply before a caller is authenticated: connections, calls, health checks and reflection."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION_SERVICE

from teacher_server.config import ServeConfig
from teacher_server.monitoring.metrics import Metrics
from teacher_server.requests.service_interceptor import Handler, ServiceInterceptor, with_request_stream

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


async def _map_each(items: AsyncIterator[bytes], function: Callable[[bytes], Awaitable[Any]]) -> AsyncIterator[Any]:
    async for item in items:
        yield await function(item)


async def read_message(context: grpc.aio.ServicerContext) -> bytes | None:
    """Read the next message of a call that is registered with a request stream; None after the last one."""
    data: Any = await context.read()
    return data if isinstance(data, bytes) else None


class OpenServicesInterceptor(ServiceInterceptor):
    """Limits the services that need no token, health checks and reflection. Calls of other services pass through.

    Args:
        metrics: count the refused calls.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        super().__init__({HEALTH_SERVICE: self._probe, REFLECTION_SERVICE: self._reflection})
        self._open: Counter[str] = Counter()
        self._reading = asyncio.Semaphore(PROBES_READ_AT_ONCE)

    def _probe(self, path: str, handler: Any) -> Handler:
        """The same method with its request as a stream, so that gRPC reads it only when the method asks for it."""
        method = handler.unary_stream if handler.response_streaming else handler.unary_unary

        async def probe(_requests: object, context: grpc.aio.ServicerContext) -> Any:
            async with self._counted(path, MAX_OPEN_PROBES, context):
                data = await self._read(context)
                if data is None:
                    problem = f"the request has more than {MAX_PROBE_BYTES} bytes, or took over {PROBE_SECONDS:g} s"
                    return await self._refuse(path, context, grpc.StatusCode.INVALID_ARGUMENT, problem)
                return await method(await self._parse(path, handler, data, context), context)

        return with_request_stream(handler, probe)

    def _reflection(self, path: str, handler: Any) -> Handler:
        async def reflect(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async with self._counted(path, MAX_OPEN_REFLECTIONS, context):
                parsed = _map_each(requests, lambda data: self._parse(path, handler, data, context))
                async for response in handler.stream_stream(parsed, context):
                    yield response

        return with_request_stream(handler, reflect)

    @contextlib.asynccontextmanager
    async def _counted(self, path: str, limit: int, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        if self._open[path] >= limit:
            problem = f"{limit} calls of {path} are open, the limit"
            await self._refuse(path, context, grpc.StatusCode.RESOURCE_EXHAUSTED, problem)
        self._open[path] += 1
        try:
            yield
        finally:
            self._open[path] -= 1

    async def _parse(self, path: str, handler: Any, data: bytes, context: grpc.aio.ServicerContext) -> Any:
        try:
            return handler.request_deserializer(data)
        except DecodeError as error:
            await self._refuse(path, context, grpc.StatusCode.INVALID_ARGUMENT, f"the request is malformed: {error}")

    async def _refuse(self, path: str, context: grpc.aio.ServicerContext, code: grpc.StatusCode, problem: str) -> None:
        self._metrics.requests.labels(path.rpartition("/")[2], code.name).inc()
        await context.abort(code, problem)

    async def _read(self, context: grpc.aio.ServicerContext) -> bytes | None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROBE_SECONDS), self._reading:
                data = await read_request(context)
                return data if len(data) <= MAX_PROBE_BYTES else None
        return None

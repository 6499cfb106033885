"""Base of the gRPC interceptors: replaces the methods of some services."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

import grpc
import grpc.aio

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class ServiceInterceptor(grpc.aio.ServerInterceptor):
    """Replaces the handlers of some services; calls of other services pass through.

    Args:
        replace: by the full name of a service, what makes the new handler from a call's path and its handler.
    """

    def __init__(self, replace: Mapping[str, Callable[[str, Any], Handler]]) -> None:
        self._replace = {f"/{service}/": make for service, make in replace.items()}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Called by gRPC for every call."""
        handler, path = await continuation(handler_call_details), handler_call_details.method
        make = next((make for prefix, make in self._replace.items() if path.startswith(prefix)), None)
        return handler if handler is None or make is None else make(path, handler)


def with_request_stream(handler: Any, method: Callable[..., Any], deserializer: Any = None) -> Handler:
    """A handler that gives `method` a stream of requests, whether or not `handler` takes one."""
    make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    return make(method, request_deserializer=deserializer, response_serializer=handler.response_serializer)

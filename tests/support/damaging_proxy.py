"""A gRPC proxy in front of a real server that damages the messages that pass through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc

Damage = Callable[[bytes], bytes]


def unchanged(message: bytes) -> bytes:
    return message


def flip(message: bytes, bit: int) -> bytes:
    """The message with one bit flipped; `bit` is taken modulo the message's number of bits."""
    at = bit % (8 * len(message))
    damaged = bytearray(message)
    damaged[at // 8] ^= 1 << at % 8
    return bytes(damaged)


class DamagingProxy(grpc.GenericRpcHandler):
    """Forwards StreamKV and Generate as bytes through `request` and `response`, and other calls unchanged."""

    def __init__(self, endpoint: str) -> None:
        self.request: Damage = unchanged
        self.response: Damage = unchanged
        self._channel = grpc.insecure_channel(endpoint)
        self._server = grpc.server(ThreadPoolExecutor(4))
        self._server.add_generic_rpc_handlers((self,))
        self.endpoint = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait(5)
        self._channel.close()

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler[bytes, bytes]:
        """See `grpc.GenericRpcHandler.service`."""
        method: str = handler_call_details.method
        onward: Any = self._channel.unary_stream(method)
        damages = method.endswith(("/StreamKV", "/Generate"))

        def pass_on(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            call = onward(self.request(request) if damages else request, timeout=20)
            try:
                for number, message in enumerate(call):
                    if number == 0:
                        context.send_initial_metadata(tuple(call.initial_metadata()))
                    yield self.response(message) if damages else message
            except grpc.RpcError:
                context.abort(call.code(), call.details())

        return grpc.unary_stream_rpc_method_handler(pass_on)

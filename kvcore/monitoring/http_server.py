"""The HTTP server of teacher servers and trainers, on a port that is bound before it serves."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import threading
from collections.abc import Generator
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvcore.errors import FieldError

logger = logging.getLogger(__name__)
STOP_SECONDS = 5.0
MAX_CONNECTIONS = 128
HEADER_SECONDS = 10.0
# Asyncio accepts this many connections before it closes any. The kernel holds as many more.
ACCEPTED_AT_ONCE = 64


class LimitedProtocol(H11Protocol):
    """One connection. It is closed if no complete request header came for `HEADER_SECONDS`.

    If more than `MAX_CONNECTIONS` are open, the one that waits longest for a header is closed.

    Args:
        waiting: the server's connections that wait for a header, the oldest first.
        arguments: those of uvicorn.
    """

    def __init__(self, waiting: dict[LimitedProtocol, asyncio.TimerHandle], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._waiting = waiting

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Called by asyncio."""
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > MAX_CONNECTIONS:
            oldest = next(iter(self._waiting))
            oldest._stop_waiting()  # noqa: SLF001  of the same class
            oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Called by uvicorn."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        super().connection_lost(exc)
        self._stop_waiting()

    def _watch(self) -> None:
        answering = bool(self.cycle) and not self.cycle.response_complete
        if answering or self.transport.is_closing():
            self._stop_waiting()
        elif self not in self._waiting:
            self._waiting[self] = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if timer := self._waiting.pop(self, None):
            timer.cancel()


class HttpServer(uvicorn.Server):
    """uvicorn without its own signal handlers and log configuration, and with limits of connections and headers."""

    def __init__(self, app: FastAPI) -> None:
        protocol: Any = partial(LimitedProtocol, {})
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                backlog=ACCEPTED_AT_ONCE,
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leaves signals to the application."""
        yield


def bind(host: str, port: int, field: str, *, or_free: bool = False) -> socket.socket:
    """Opens a listening TCP socket; port 0 takes a free port.

    Args:
        host: name or address of the interface.
        port: to listen on.
        field: the setting that errors name.
        or_free: whether a port in use is replaced by a free one, with a warning.

    Raises:
        FieldError: cannot listen on the address.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        if or_free and error.errno == errno.EADDRINUSE:
            logger.warning("%s: port %d is in use; listening on a free port instead", field, port)
            return bind(host, 0, field)
        raise FieldError(field, f"cannot listen on {host}:{port}: {error.strerror or error}") from error


@contextlib.contextmanager
def serving_in_thread(app: FastAPI, listener: socket.socket) -> Generator[None, None, None]:
    """Serves in a background thread, and closes the socket at the end."""
    server = HttpServer(app)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), name="http", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(STOP_SECONDS)
        listener.close()

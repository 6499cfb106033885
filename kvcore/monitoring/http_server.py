"""The HTTP side that servers and trainers share: a port taken before anything is served, and a server on it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Generator

import uvicorn
from fastapi import FastAPI

from kvcore.errors import FieldError

STOP_SECONDS = 5.0


class HttpServer(uvicorn.Server):
    """uvicorn that keeps its hands off signals and logs."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_config=None, log_level="warning", access_log=False, lifespan="off", server_header=False
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals belong to the application."""
        yield


def bind(host: str, port: int, field: str) -> socket.socket:
    """A listening TCP socket; a port of 0 takes a free one.

    Raises:
        FieldError: the address cannot be had; names `field`.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        raise FieldError(field, f"cannot listen on {host}:{port}: {error.strerror or error}") from error


@contextlib.contextmanager
def serving_in_thread(app: FastAPI, listener: socket.socket) -> Generator[None, None, None]:
    """Serves from a thread of its own, for a process whose main thread does something else. Closes the socket."""
    server = HttpServer(app)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), name="http", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(STOP_SECONDS)
        listener.close()

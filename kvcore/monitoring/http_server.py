"""The HTTP server of teacher servers and trainers, on a port that is bound before it serves."""

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
    """uvicorn without its own signal handlers and log configuration."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_config=None, log_level="warning", access_log=False, lifespan="off", server_header=False
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leaves signals to the application."""
        yield


def bind(host: str, port: int, field: str) -> socket.socket:
    """Opens a listening TCP socket; port 0 takes a free port.

    Raises:
        FieldError: cannot listen on the address; names `field`.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
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

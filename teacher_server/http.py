"""The HTTP side: probes, metrics, and a page for people. It only ever reads."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from kvcore.errors import FieldError
from kvcore.live_page import HEADERS
from teacher_server.page import render_page
from teacher_server.state import ServerState


def build_app(state: ServerState) -> FastAPI:
    """The routes over a server's state."""
    app = FastAPI(title="kvdistill teacher server", docs_url=None, redoc_url=None)

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """The process lives."""
        return "ok\n"

    @app.get("/readyz", response_class=PlainTextResponse, responses={503: {"description": "Why not."}})
    async def readyz() -> PlainTextResponse:
        """Whether requests are taken."""
        if state.not_ready is None:
            return PlainTextResponse("ready\n")
        return PlainTextResponse(f"{state.not_ready}\n", status_code=503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus text format."""
        return Response(state.render_metrics(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/info")
    async def info() -> JSONResponse:
        """The teacher, its limits and its load."""
        return JSONResponse(state.describe())

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        """The same for people."""
        return HTMLResponse(render_page(state.describe()), headers=HEADERS)

    return app


class HttpServer(uvicorn.Server):
    """uvicorn on the process's event loop, which keeps its hands off the signals."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", server_header=False))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the application."""
        yield


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Raises:
        FieldError: the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        raise FieldError("http_port", f"cannot listen on {host}:{port}: {error.strerror or error}") from error

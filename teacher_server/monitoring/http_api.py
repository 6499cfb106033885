"""The read-only HTTP API: probes, metrics, JSON and the status page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from kvcore.monitoring.live_page import HEADERS, add_scripts
from teacher_server.monitoring.status_page import render_page
from teacher_server.state import ServerState


def build_app(state: ServerState, grpc_problem: Callable[[], Awaitable[str | None]]) -> FastAPI:
    """Build the routes over a server's state.

    Args:
        state: of the server.
        grpc_problem: probes the gRPC server; returns why it does not answer, or None.
    """
    app = FastAPI(title="kvdistill teacher server", docs_url=None, redoc_url=None)

    add_scripts(app)

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """The process is alive."""
        return "ok\n"

    @app.get("/readyz", response_class=PlainTextResponse, responses={503: {"description": "Not ready, with reason."}})
    async def readyz() -> PlainTextResponse:
        """Whether the server accepts requests and its gRPC side answers."""
        problem = state.not_ready or await grpc_problem()
        if problem is None:
            return PlainTextResponse("ready\n")
        return PlainTextResponse(f"{problem}\n", status_code=503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus text format."""
        return Response(state.render_metrics(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/info")
    async def info() -> JSONResponse:
        """The teacher, its limits and its load as JSON."""
        return JSONResponse(state.describe())

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        """The status page: the content of `/info` as HTML."""
        return HTMLResponse(render_page(state.describe(), state.history.curves()), headers=HEADERS)

    return app

"""The HTTP side: probes, metrics, and a page for people. It only ever reads."""

from __future__ import annotations

import contextlib
import html
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from kvcore.errors import FieldError
from teacher_server.state import ServerState

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="5">
<title>{name} - kvdistill</title>
<style>
:root {{ color-scheme: light dark; --ink: #1c1e21; --dim: #5f6670; --paper: #fff; --line: #dfe2e7;
  --ok: #157347; --bad: #b3261e; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e8eb; --dim: #9aa2ad; --paper: #16181c; --line: #30353d; --ok: #4cc38a; --bad: #ff8a80; }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 46rem;
  margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1rem; margin: 1.6rem 0 .3rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }}
th {{ font-weight: normal; color: var(--dim); width: 14rem; }}
td {{ overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }}
.ready {{ color: var(--ok); }} .waiting {{ color: var(--bad); }}
a {{ color: inherit; }}
</style>
</head>
<body>
<h1>{name}</h1>
<p class="{phase}" role="status">{status}</p>
{tables}
<p><a href="/info">info</a> · <a href="/metrics">metrics</a> ·
<a href="/healthz">healthz</a> · <a href="/readyz">readyz</a></p>
</body>
</html>
"""


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
        policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
        return HTMLResponse(render_page(state), headers={"Content-Security-Policy": policy})

    return app


def render_page(state: ServerState) -> str:
    """The status page: no script, nothing from elsewhere, every value escaped."""
    info = state.describe()
    tables = {"Load": info["load"], "Teacher": info["teacher"] or {}, "Limits": info["limits"]}
    own = {key: info[key] for key in ("uptime_seconds", "grpc_port", "http_port")}
    ready = state.not_ready is None
    return PAGE.format(
        name=html.escape(info["name"]),
        phase="ready" if ready else "waiting",
        status="Ready" if ready else f"Not ready: {html.escape(info['not_ready_reason'])}",
        tables="\n".join(_table(title, rows) for title, rows in {"Server": own, **tables}.items() if rows),
    )


def _table(title: str, rows: dict[str, Any]) -> str:
    lines = (
        f"<tr><th>{_text(name.replace('_', ' '))}</th><td>{_text(value)}</td></tr>" for name, value in rows.items()
    )
    return f"<h2>{html.escape(title)}</h2>\n<table>{''.join(lines)}</table>"


def _text(value: object) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{key}={entry}" for key, entry in value.items())
    elif isinstance(value, list | tuple):
        value = ", ".join(str(entry) for entry in value)
    return html.escape(str(value))


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

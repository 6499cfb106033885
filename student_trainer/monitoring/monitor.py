"""HTTP server of rank 0 during training: a page for people, /metrics for Prometheus, /healthz for probes."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from kvcore.monitoring.http_server import bind, serving_in_thread
from student_trainer.config import TrainConfig
from student_trainer.loop.rank_failures import shared_failure
from student_trainer.monitoring.readers import Readers
from student_trainer.monitoring.run_metrics import RunMetrics
from student_trainer.monitoring.run_page import add_live_page, save_page
from student_trainer.monitoring.run_state import RunState, current_run
from student_trainer.monitoring.terminal import on_terminal

logger = logging.getLogger(__name__)
PAGE, METRICS = "/", "/metrics"
# Seconds within which an open page, and Prometheus, read again.
READ_EVERY = {PAGE: 10.0, METRICS: 60.0}


def monitor_app(config: TrainConfig, state: RunState, readers: Readers) -> FastAPI:
    """The HTTP routes, which only read a run's state."""
    app = FastAPI(title="kvdistill trainer", docs_url=None, redoc_url=None)
    metrics = RunMetrics(config, state)
    add_live_page(app, config, state)

    @app.middleware("http")
    async def note(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        """Notes who reads what."""
        readers.note(request.url.path)
        return await answer(request)

    @app.get("/healthz", response_class=PlainTextResponse)
    def healthz() -> str:
        """Liveness."""
        return "ok\n"

    @app.get(METRICS, response_class=PlainTextResponse)
    def read_metrics() -> Response:
        """Prometheus text format."""
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return app


@contextlib.contextmanager
def monitored(config: TrainConfig, *, enabled: bool) -> Iterator[RunState]:
    """Creates a run's state, shows it on the terminal if there is one, and serves it if `monitor.port` is set.

    After the block an open page is served until it has shown the end; after a run that reached its end also Prometheus
    is waited for, so that it knows a finished run from a lost one. Every rank must call it; only the one with `enabled`
    shows anything and listens.

    Raises:
        FieldError: the address cannot be bound; other ranks raise KVDistillError.
    """
    state = RunState()
    with contextlib.ExitStack() as stack:
        if config.monitor.port is not None:
            listener: socket.socket | None = None
            with shared_failure():
                if enabled:
                    listener = bind(config.monitor.host, config.monitor.port, "monitor.port", or_free=True)
            if listener is not None:
                readers = Readers()
                stack.enter_context(serving_in_thread(monitor_app(config, state, readers), listener))
                stack.callback(_wait_for_readers, readers, state)
                logger.info("monitor: http://%s:%d/", *listener.getsockname()[:2])
        stack.enter_context(on_terminal(state, config.run.output_dir.name, enabled=enabled))
        if enabled:
            stack.callback(_keep_page, config, state)
        stack.callback(current_run.reset, current_run.set(state))
        try:
            yield state
        except BaseException as error:
            state.phase, state.problem = "failed", str(error) or type(error).__name__
            raise
        state.phase = "done"


def _keep_page(config: TrainConfig, state: RunState) -> None:
    """Saves the page of a run that had begun, so that a refused command does not replace that of an earlier run."""
    if not (state.steps and config.run.output_dir.is_dir()):
        return
    try:
        save_page(config, state.snapshot())
    except OSError as error:
        logger.warning("the page of the run was not saved: %s", error)


def _wait_for_readers(readers: Readers, state: RunState) -> None:
    paths = (PAGE, METRICS) if state.phase == "done" else (PAGE,)
    readers.wait_for_each({path: READ_EVERY[path] for path in paths})

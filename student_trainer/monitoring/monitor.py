"""HTTP server of rank 0 during training: a page for people, /metrics for Prometheus, /healthz for probes."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator

from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from kvcore.monitoring.http_server import bind, serving_in_thread
from student_trainer.config import TrainConfig
from student_trainer.loop.rank_failures import shared_failure
from student_trainer.monitoring.run_metrics import RunMetrics
from student_trainer.monitoring.run_page import add_live_page
from student_trainer.monitoring.run_state import RunState, current_run
from student_trainer.monitoring.terminal import on_terminal

logger = logging.getLogger(__name__)


def monitor_app(config: TrainConfig, state: RunState) -> FastAPI:
    """The HTTP routes, which only read a run's state."""
    app = FastAPI(title="kvdistill trainer", docs_url=None, redoc_url=None)
    metrics = RunMetrics(config, state)
    add_live_page(app, config, state)

    @app.get("/healthz", response_class=PlainTextResponse)
    def healthz() -> str:
        """Liveness."""
        return "ok\n"

    @app.get("/metrics", response_class=PlainTextResponse)
    def read_metrics() -> Response:
        """Prometheus text format."""
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return app


@contextlib.contextmanager
def monitored(config: TrainConfig, *, enabled: bool) -> Iterator[RunState]:
    """Creates a run's state, shows it on the terminal if there is one, and serves it if `monitor.port` is set.

    Every rank must call it; only the one with `enabled` shows anything and listens.

    Raises:
        FieldError: the address cannot be bound; other ranks raise KVDistillError.
    """
    state = RunState()
    with contextlib.ExitStack() as stack:
        if config.monitor.port is not None:
            listener: socket.socket | None = None
            with shared_failure():
                if enabled:
                    listener = bind(config.monitor.host, config.monitor.port, "monitor.port")
            if listener is not None:
                stack.enter_context(serving_in_thread(monitor_app(config, state), listener))
                logger.info("monitor: http://%s:%d/", *listener.getsockname()[:2])
        stack.enter_context(on_terminal(state, config.run.output_dir.name, enabled=enabled))
        stack.callback(current_run.reset, current_run.set(state))
        try:
            yield state
        except BaseException:
            state.phase = "failed"
            raise
        state.phase = "done"

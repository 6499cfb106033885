"""What one running server knows about itself, shared by its gRPC and HTTP sides. For the event loop's thread."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kvcore.errors import KVDistillError
from teacher_server.config import ServeConfig
from teacher_server.engines.base import TeacherEngine
from teacher_server.monitoring.activity import Activity
from teacher_server.monitoring.metrics import Metrics
from teacher_server.sample_queue import BusyError
from teacher_server.scheduler import Scheduler

BUSY_STREAMS_RETRY_MS = 200


class NotReadyError(KVDistillError):
    """The server is up but serves no K/V at the moment."""


@dataclass(frozen=True, slots=True)
class Backend:
    """The loaded teacher and the thread that runs it."""

    engine: TeacherEngine
    scheduler: Scheduler


@dataclass(slots=True)
class ServerState:
    """Phase and load.

    `phase_problem`: why the model takes no requests, None once it does. `grpc_problem`: why the gRPC server takes none.
    `idle`: set while no stream is open.
    """

    config: ServeConfig
    metrics: Metrics = field(default_factory=Metrics)
    activity: Activity = field(default_factory=Activity)
    phase_problem: str | None = "the model is loading"
    grpc_problem: str | None = None
    backend: Backend | None = None
    open_streams: int = 0
    grpc_port: int = 0
    http_port: int = 0
    started: float = field(default_factory=time.monotonic)
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def not_ready(self) -> str | None:
        """Why no requests are taken, None while they are."""
        return self.phase_problem or self.grpc_problem

    def set_ready(self, not_ready: str | None) -> None:
        """Takes requests from here on, or refuses them with a reason."""
        self.phase_problem = not_ready
        self.metrics.ready.set(self.not_ready is None)

    def set_grpc_problem(self, problem: str | None) -> None:
        """Takes requests again after a crash of the gRPC server, or refuses them with a reason."""
        self.grpc_problem = problem
        self.metrics.ready.set(self.not_ready is None)

    def loaded(self) -> Backend:
        """The teacher.

        Raises:
            NotReadyError: it is not loaded.
        """
        if self.backend is None:
            raise NotReadyError(self.not_ready or "the model is not loaded")
        return self.backend

    @contextlib.contextmanager
    def open_stream(self) -> Iterator[None]:
        """Counts a stream while it is open.

        Raises:
            NotReadyError: loading, draining, or the engine is broken.
            BusyError: `max_streams` are open.
        """
        if self.not_ready is not None:
            raise NotReadyError(self.not_ready)
        if self.open_streams >= self.config.max_streams:
            raise BusyError(f"{self.open_streams} requests are open, the limit (max_streams)", BUSY_STREAMS_RETRY_MS)
        self.open_streams += 1
        self.idle.clear()
        try:
            yield
        finally:
            self.open_streams -= 1
            if not self.open_streams:
                self.idle.set()

    def load(self) -> dict[str, int]:
        """What is waiting and running."""
        queue = self.backend.scheduler.queue if self.backend else None
        return {
            "open_streams": self.open_streams,
            "queued_samples": queue.ready_samples if queue else 0,
            "queued_tokens": queue.tokens if queue else 0,
        }

    def describe(self) -> dict[str, Any]:
        """Everything that `/info` shows."""
        config = self.config
        return {
            "name": config.teacher_name,
            "ready": self.not_ready is None,
            "not_ready_reason": self.not_ready,
            "uptime_seconds": round(time.monotonic() - self.started, 3),
            "grpc_port": self.grpc_port,
            "http_port": self.http_port,
            "teacher": dataclasses.asdict(self.backend.engine.info) if self.backend else None,
            "limits": {
                "max_batch_tokens": config.max_batch_tokens,
                "max_queued_tokens": config.max_queued_tokens,
                "max_streams": config.max_streams,
                "max_request_seconds": config.max_request_seconds,
                "stream_window_bytes": config.stream_window_bytes,
            },
            "load": self.load(),
            "throughput": self.activity.throughput(),
            "connections": self.activity.connections(),
            "callers": self.activity.callers(),
            "recent_errors": self.activity.problems(),
        }

    def sample(self) -> None:
        """Notes how much was done so far, for rates over the last minute."""
        self.activity.sample(self.metrics.registry.get_sample_value("kvdistill_tokens_total") or 0.0)

    def render_metrics(self) -> bytes:
        """The metrics, with the gauges as they stand."""
        load = self.load()
        if self.backend is not None:
            info = self.backend.engine.info
            self.metrics.teacher.labels(self.config.teacher_name, info.model, info.engine, info.dtype).set(1)
        self.metrics.streams_limit.set(self.config.max_streams)
        self.metrics.queued_tokens_limit.set(self.config.max_queued_tokens)
        self.metrics.streams.set(load["open_streams"])
        self.metrics.queued_samples.set(load["queued_samples"])
        self.metrics.queued_tokens.set(load["queued_tokens"])
        return self.metrics.render()

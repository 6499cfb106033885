"""The state of a running server, shared by its gRPC and HTTP sides. Used on the event loop's thread only."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kvcore.errors import KVDistillError
from teacher_server.config import ServeConfig
from teacher_server.engines.base import TeacherEngine
from teacher_server.fair_share import Caller
from teacher_server.monitoring.activity import Activity
from teacher_server.monitoring.load_history import Load, LoadHistory
from teacher_server.monitoring.metrics import Metrics
from teacher_server.requests.map_store import MapStore
from teacher_server.requests.shared_frames import SharedFrames
from teacher_server.sample_queue import BusyError
from teacher_server.scheduler import Scheduler

BUSY_STREAMS_RETRY_MS = 200
STREAMS_PER_KEPT_STREAM = 8
# Shown by `/info`, by their names in `ServeConfig`.
LIMITS = (
    "max_batch_tokens",
    "max_queued_tokens",
    "max_streams",
    "max_request_seconds",
    "stream_window_bytes",
    "max_unsent_bytes",
    "shared_memory_bytes",
)


class NotReadyError(KVDistillError):
    """The server runs but does not serve K/V at the moment."""


@dataclass(frozen=True, slots=True)
class Backend:
    """The loaded teacher and the scheduler that runs it."""

    engine: TeacherEngine
    scheduler: Scheduler


@dataclass(slots=True)
class ServerState:
    """Readiness and load.

    `phase_problem`: why the model takes no requests; None while it takes them. `grpc_problem`: the same for the gRPC
    server. `idle`: set while no stream is open.
    """

    config: ServeConfig
    metrics: Metrics = field(default_factory=Metrics)
    activity: Activity = field(default_factory=Activity)
    history: LoadHistory = field(default_factory=LoadHistory)
    phase_problem: str | None = "the model is loading"
    grpc_problem: str | None = None
    backend: Backend | None = None
    open_streams: int = 0
    grpc_port: int = 0
    http_port: int = 0
    started: float = field(default_factory=time.monotonic)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    _streams: Counter[Caller] = field(default_factory=Counter)
    maps: MapStore = field(init=False)
    shared: SharedFrames = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        self.maps = MapStore(config.max_map_bytes)
        self.shared = SharedFrames(config.shared_memory_bytes, config.shared_client_bytes, config.max_frame_bytes)
        self.idle.set()

    @property
    def not_ready(self) -> str | None:
        """Why requests are refused; None while they are accepted."""
        return self.phase_problem or self.grpc_problem

    def loaded(self) -> Backend:
        """The teacher.

        Raises:
            NotReadyError: it is not loaded.
        """
        if self.backend is None:
            raise NotReadyError(self.not_ready or "the model is not loaded")
        return self.backend

    @contextlib.contextmanager
    def open_stream(self, caller: Caller) -> Iterator[None]:
        """Count a stream while it is open. The last streams of `max_streams` are for callers that have none.

        Raises:
            NotReadyError: the server is loading or draining, or the engine is broken.
            BusyError: `max_streams` streams are open.
        """
        if self.not_ready is not None:
            raise NotReadyError(self.not_ready)
        kept = self.config.max_streams // STREAMS_PER_KEPT_STREAM if self._streams[caller] else 0
        if self.open_streams >= self.config.max_streams - kept:
            for_others = f", {kept} of them kept for callers that have none open" if kept else ""
            raise BusyError(
                f"{self.open_streams} requests are open; the limit is {self.config.max_streams} (max_streams)"
                f"{for_others}",
                BUSY_STREAMS_RETRY_MS,
            )
        self.open_streams += 1
        self._streams[caller] += 1
        self.idle.clear()
        try:
            yield
        finally:
            self._streams[caller] -= 1
            if not self._streams[caller]:
                del self._streams[caller]
            self.open_streams -= 1
            if not self.open_streams:
                self.idle.set()

    def load(self) -> dict[str, int]:
        """Open streams, and the samples and tokens in the queue."""
        queue = self.backend.scheduler.queue if self.backend else None
        return {
            "open_streams": self.open_streams,
            "queued_samples": queue.ready_samples if queue else 0,
            "queued_tokens": queue.tokens if queue else 0,
        }

    def describe(self) -> dict[str, Any]:
        """The content of `/info`."""
        return {
            "name": self.config.teacher_name,
            "model_path": self.config.model,
            "ready": self.not_ready is None,
            "not_ready_reason": self.not_ready,
            "uptime_seconds": round(time.monotonic() - self.started, 3),
            "grpc_port": self.grpc_port,
            "http_port": self.http_port,
            "teacher": dataclasses.asdict(self.backend.engine.info) if self.backend else None,
            "limits": {name: getattr(self.config, name) for name in LIMITS},
            "load": self.load(),
            "shared_memory_bytes": self.shared.nbytes,
            "throughput": self.activity.throughput(),
            "connections": self.activity.connections(),
            "callers": self.activity.callers(),
            "recent_errors": self.activity.problems(),
        }

    def sample(self) -> None:
        """Record the totals so far, from which the rates of the last minute are computed."""
        self.maps.drop_unused()
        self.shared.drop_unused()
        tokens = self.metrics.registry.get_sample_value("kvdistill_tokens_total") or 0.0
        self.activity.sample(tokens)
        load = self.load()
        self.history.add(Load(tokens, self.activity.sent_bytes, load["open_streams"], load["queued_tokens"]))

    def render_metrics(self) -> bytes:
        """Update the gauges and render all metrics."""
        load = self.load()
        if self.backend is not None:
            info = self.backend.engine.info
            self.metrics.teacher.labels(self.config.teacher_name, info.model, info.engine, info.dtype).set(1)
        self.metrics.ready.set(self.not_ready is None)
        self.metrics.streams_limit.set(self.config.max_streams)
        self.metrics.queued_tokens_limit.set(self.config.max_queued_tokens)
        self.metrics.shared_memory_bytes.set(self.shared.nbytes)
        self.metrics.streams.set(load["open_streams"])
        self.metrics.queued_samples.set(load["queued_samples"])
        self.metrics.queued_tokens.set(load["queued_tokens"])
        return self.metrics.render()

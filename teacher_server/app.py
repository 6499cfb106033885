"""The lifecycle of a teacher server: starts HTTP and gRPC, loads the model, tests it, serves, drains and exits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio  # pyright: ignore[reportAttributeAccessIssue]

from kvcore.errors import KVDistillError
from kvcore.monitoring import tracing
from kvcore.monitoring.http_server import HttpServer, bind
from teacher_server.config import ServeConfig
from teacher_server.engines import load_engine
from teacher_server.engines.base import EngineLostError, TeacherEngine
from teacher_server.grpc_server import GrpcCrashError, GrpcServer
from teacher_server.monitoring import logs
from teacher_server.monitoring.http_api import build_app
from teacher_server.monitoring.logs import log_event
from teacher_server.open_files import raise_limit
from teacher_server.requests.service import SERVICE, TeacherKVService
from teacher_server.sample_queue import BusyError, SampleQueue
from teacher_server.scheduler import Scheduler
from teacher_server.self_test import SelfTestError, batch_test, self_test
from teacher_server.state import Backend, ServerState

log = logging.getLogger(__name__)

RETEST_SECONDS = 10.0
SHUTDOWN_SECONDS = 2.0
SAMPLE_SECONDS = 5.0
LOADING_SECONDS = 15.0


class LoadError(KVDistillError):
    """The model's libraries failed to load it."""


def run(config: ServeConfig) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends at once.

    Logs go to stderr: JSON Lines, or text on a terminal.

    Raises:
        KVDistillError: a port, the model or the self-test failed, or traces cannot be exported as configured.
    """
    logs.configure(config.log_level)
    raise_limit()
    stop_tracing = tracing.start("kvdistill-teacher", f"{config.teacher_name}@{socket.gethostname()}:{os.getpid()}")
    try:
        stopped, status = asyncio.run(_serve_until_signalled(config)), 0
    except GrpcCrashError as error:
        log_event(log, "gave_up", level=logging.ERROR, problem=error.line())
        stopped, status = False, 1
    finally:
        stop_tracing()
    if not stopped:
        # A thread may still run the model; interpreter shutdown could crash or hang in it.
        logging.shutdown()
        os._exit(status)


async def _serve_until_signalled(config: ServeConfig) -> bool:
    server = TeacherServer(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, server.request_stop)
    return await server.serve()


class TeacherServer:
    """One teacher replica in this process. Create it on a running event loop.

    Args:
        config: what to serve, where, and its limits.
        load: loads the engine; called in its own thread.

    Raises:
        FieldError: a certificate, key or token cannot be read.
    """

    def __init__(self, config: ServeConfig, load: Callable[[ServeConfig], TeacherEngine] = load_engine) -> None:
        self.state = ServerState(config)
        self._config = config
        self._load = load
        self._service = TeacherKVService(self.state)
        self._health = health_aio.HealthServicer()
        self._grpc_server = GrpcServer(self.state, self._service, self._health)
        self._stop = asyncio.Event()
        self._engine_failed = asyncio.Event()
        self._fatal: KVDistillError | None = None

    async def serve(self) -> bool:
        """Serve until the end; returns False if the engine's thread still runs a batch.

        Raises:
            KVDistillError: a port, the model or the self-test failed.
        """
        async with self._http():
            async with self._grpc():
                logs.show_banner(self._config, self.state.grpc_port, self.state.http_port)
                log_event(log, "listening", grpc_port=self.state.grpc_port, http_port=self.state.http_port)
                loaded = await self._finished_before_stop(asyncio.create_task(self._start()))
                if loaded:
                    watch = asyncio.create_task(self._watch_engine())
                    await self._stop.wait()
                    watch.cancel()
                    await self._drain()
            # In a thread, so that /healthz answers until the end.
            ended = loaded and await asyncio.to_thread(self._end_engine)
        if self._fatal is not None:
            raise self._fatal
        return ended

    def request_stop(self) -> None:
        """Begin to drain; exit at once if the server already drains."""
        if self._stop.is_set():
            log.warning("second signal: exiting at once")
            logging.shutdown()
            os._exit(1)
        self._stop.set()

    async def _start(self) -> None:
        config, started = self._config, time.monotonic()
        engine = await _load_in_thread(self._load, config)
        queue = SampleQueue(
            config.max_queued_tokens,
            config.max_batch_tokens,
            config.stream_window_bytes,
            config.max_unsent_bytes,
            engine.small_batch_tokens,
        )
        scheduler = Scheduler(engine, queue, self.state.metrics, self._on_engine_error, config.cache_bytes)
        self.state.backend = Backend(engine, scheduler)
        self.state.phase_problem = "the self-test is running"
        await self_test(self._service, queue, engine.info)
        await self._accept_requests()
        log_event(
            log,
            "ready",
            grpc_port=self.state.grpc_port,
            http_port=self.state.http_port,
            teacher=config.teacher_name,
            weights_digest=engine.info.weights_digest,
            seconds=round(time.monotonic() - started, 3),
        )

    async def _accept_requests(self) -> None:
        self.state.phase_problem = None
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)

    async def _finished_before_stop(self, task: asyncio.Task[None]) -> bool:
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not task.done():
            task.cancel()
            return False
        await task
        return True

    def _check_engine(self) -> None:
        """Notice an engine that ended while it was idle."""
        backend = self.state.backend
        if backend is not None and not self._stop.is_set():
            try:
                backend.engine.check()
            except EngineLostError as error:
                self._on_engine_error(error)

    def _on_engine_error(self, error: Exception) -> None:
        if isinstance(error, EngineLostError):
            self._fatal = error
            self._stop.set()
        self._engine_failed.set()

    async def _watch_engine(self) -> None:
        """Repeat the self-test after a failed batch; refuse requests until it passes."""
        while True:
            await self._engine_failed.wait()
            self._engine_failed.clear()
            if not await self._engine_works():
                await asyncio.sleep(RETEST_SECONDS)
                self._engine_failed.set()

    async def _engine_works(self) -> bool:
        try:
            backend = self.state.loaded()
            await self_test(self._service, backend.scheduler.queue, backend.engine.info)
        except BusyError:
            return True
        except SelfTestError as error:
            self.state.phase_problem = str(error)
            await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
            log_event(log, "engine_broken", level=logging.ERROR, problem=str(error))
            return False
        if self.state.phase_problem is not None:
            await self._accept_requests()
            log_event(log, "engine_works_again")
        return True

    @contextlib.asynccontextmanager
    async def _http(self) -> AsyncIterator[None]:
        listener = bind(self._config.http_host, self._config.http_port, "http_port")
        self.state.http_port = listener.getsockname()[1]
        server = HttpServer(build_app(self.state, self._grpc_server.problem))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        sampling_load = asyncio.create_task(self._sample_load())
        try:
            yield
        finally:
            sampling_load.cancel()
            server.should_exit = True
            await task

    async def _sample_load(self) -> None:
        while True:
            self.state.sample()
            self._check_engine()
            await asyncio.sleep(SAMPLE_SECONDS)

    @contextlib.asynccontextmanager
    async def _grpc(self) -> AsyncIterator[None]:
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._grpc_server.start()
        watch = asyncio.create_task(self._watch_grpc())
        try:
            yield
        finally:
            watch.cancel()
            await self._grpc_server.stop(SHUTDOWN_SECONDS)
            self._service.close()

    async def _watch_grpc(self) -> None:
        try:
            await self._grpc_server.watch()
        except KVDistillError as error:
            self._fatal = error
            self._stop.set()

    async def _drain(self) -> None:
        self.state.phase_problem = "the server is draining"
        await self._health.enter_graceful_shutdown()
        log_event(log, "draining", open_streams=self.state.open_streams, seconds=self._config.drain_seconds)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.state.idle.wait(), self._config.drain_seconds)
        log_event(log, "drained", cut_off_streams=self.state.open_streams)

    def _end_engine(self) -> bool:
        backend = self.state.loaded()
        if not backend.scheduler.close(SHUTDOWN_SECONDS):
            return False
        backend.engine.close()
        return True


async def _load_in_thread(load: Callable[[ServeConfig], TeacherEngine], config: ServeConfig) -> TeacherEngine:
    """Load the engine in a daemon thread, which cannot keep a stopping process alive, and log that it still loads."""
    result: Future[TeacherEngine] = Future()
    result.set_running_or_notify_cancel()

    def work() -> None:
        try:
            result.set_result(_load(load, config))
        except BaseException as error:  # noqa: BLE001  raised again where the result is awaited
            result.set_exception(error)

    threading.Thread(target=work, name="loader", daemon=True).start()
    loading, started = asyncio.wrap_future(result), time.monotonic()
    try:
        while not (await asyncio.wait({loading}, timeout=LOADING_SECONDS))[0]:
            log_event(log, "loading", model=config.model, seconds=round(time.monotonic() - started, 3))
        return await loading
    finally:
        loading.cancel()


def _load(load: Callable[[ServeConfig], TeacherEngine], config: ServeConfig) -> TeacherEngine:
    try:
        return _tested(load(config))
    except KVDistillError:
        raise
    except Exception as error:
        log_event(log, "load_failed", level=logging.ERROR, error=error, model=config.model)
        raise LoadError(f"model: '{config.model}' cannot be loaded: {type(error).__name__}: {error}") from error


def _tested(engine: TeacherEngine) -> TeacherEngine:
    try:
        batch_test(engine)
    except BaseException:
        engine.close()
        raise
    return engine

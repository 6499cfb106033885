"""A teacher server's life: HTTP first, then the model, a self-test, requests, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TypeVar

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
from teacher_server.sample_queue import BusyError, SampleQueue
from teacher_server.scheduler import Scheduler
from teacher_server.self_test import SelfTestError, self_test
from teacher_server.service import SERVICE, TeacherKVService
from teacher_server.state import Backend, ServerState

log = logging.getLogger(__name__)

RETEST_SECONDS = 10.0
LAST_WORDS_SECONDS = 2.0
SAMPLE_SECONDS = 5.0
LOADING_SECONDS = 15.0

ResultT = TypeVar("ResultT")


class LoadError(KVDistillError):
    """The model could not be loaded, for a reason that its libraries know."""


def run(config: ServeConfig) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends at once.

    Logs go to stderr: JSON Lines, or text on a terminal.

    Raises:
        KVDistillError: a port, the model or the self-test failed, or traces cannot be sent as asked.

    Ends the process with exit status 1 if the gRPC server crashes 5 times within 60 s.
    """
    logs.configure(config.log_level)
    stop_tracing = tracing.start("kvdistill-teacher", f"{config.teacher_name}@{socket.gethostname()}:{os.getpid()}")
    try:
        ended, status = asyncio.run(_serve_until_signalled(config)), 0
    except GrpcCrashError as error:
        log_event(log, "gave_up", level=logging.ERROR, problem=error.line())
        ended, status = False, 1
    finally:
        stop_tracing()
    if not ended:
        # A thread may still run the model, and tearing the interpreter down under it can crash or hang.
        logging.shutdown()
        os._exit(status)


async def _serve_until_signalled(config: ServeConfig) -> bool:
    server = TeacherServer(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, server.request_stop)
    return await server.serve()


class TeacherServer:
    """One teacher replica in this process. Made on a running event loop.

    Args:
        config: what to serve, where, and its limits.
        load: makes the engine, in a thread of its own.

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
        self._engine_broke = asyncio.Event()
        self._lost: KVDistillError | None = None

    async def serve(self) -> bool:
        """Runs from start to end; False if a thread of the engine still runs.

        Raises:
            KVDistillError: a port, the model or the self-test failed.
        """
        async with self._http(), self._grpc():
            logs.show_banner(self._config, self.state.grpc_port, self.state.http_port)
            log_event(log, "listening", grpc_port=self.state.grpc_port, http_port=self.state.http_port)
            start = asyncio.create_task(self._start())
            loaded = await self._finished_before_stop(start)
            if loaded:
                watch = asyncio.create_task(self._watch_engine())
                await self._stop.wait()
                watch.cancel()
                await self._drain()
        ended = loaded and self._end_engine()
        if self._lost is not None:
            raise self._lost
        return ended

    def request_stop(self) -> None:
        """Begins to drain; ends the process if it drains already."""
        if self._stop.is_set():
            log.warning("second signal: ending at once")
            logging.shutdown()
            os._exit(1)
        self._stop.set()

    async def _start(self) -> None:
        config, started = self._config, time.monotonic()
        engine = await _reported(_in_daemon_thread(lambda: _load(self._load, config)), config.model)
        queue = SampleQueue(config.max_queued_tokens, config.max_batch_tokens, config.stream_window_bytes)
        scheduler = Scheduler(engine, queue, self.state.metrics, self._on_engine_error)
        self.state.backend = Backend(engine, scheduler)
        self.state.set_ready("the self-test is running")
        await self_test(self._service, engine.info)
        await self._serve_from_now()
        log_event(
            log,
            "ready",
            grpc_port=self.state.grpc_port,
            http_port=self.state.http_port,
            teacher=config.teacher_name,
            weights_digest=engine.info.weights_digest,
            seconds=round(time.monotonic() - started, 3),
        )

    async def _serve_from_now(self) -> None:
        self.state.set_ready(None)
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

    def _look_after_engine(self) -> None:
        """An engine may end while nobody asks it anything."""
        backend = self.state.backend
        if backend is not None and not self._stop.is_set():
            try:
                backend.engine.check()
            except EngineLostError as error:
                self._on_engine_error(error)

    def _on_engine_error(self, error: Exception) -> None:
        if isinstance(error, EngineLostError):
            self._lost = error
            self._stop.set()
        self._engine_broke.set()

    async def _watch_engine(self) -> None:
        """After a batch that failed, finds out whether the engine still works, and stops serving until it does."""
        while True:
            await self._engine_broke.wait()
            self._engine_broke.clear()
            if not await self._engine_works():
                await asyncio.sleep(RETEST_SECONDS)
                self._engine_broke.set()

    async def _engine_works(self) -> bool:
        try:
            await self_test(self._service, self.state.loaded().engine.info)
        except BusyError:
            return True
        except SelfTestError as error:
            self.state.set_ready(str(error))
            await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
            log_event(log, "engine_broken", level=logging.ERROR, problem=str(error))
            return False
        if self.state.phase_problem is not None:
            await self._serve_from_now()
            log_event(log, "engine_works_again")
        return True

    @contextlib.asynccontextmanager
    async def _http(self) -> AsyncIterator[None]:
        listener = bind(self._config.http_host, self._config.http_port, "http_port")
        self.state.http_port = listener.getsockname()[1]
        server = HttpServer(build_app(self.state, self._grpc_server.problem))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        sampling = asyncio.create_task(self._sample())
        try:
            yield
        finally:
            sampling.cancel()
            server.should_exit = True
            await task

    async def _sample(self) -> None:
        while True:
            self.state.sample()
            self._look_after_engine()
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
            await self._grpc_server.stop(LAST_WORDS_SECONDS)
            self._service.close()

    async def _watch_grpc(self) -> None:
        try:
            await self._grpc_server.watch()
        except KVDistillError as error:
            self._lost = error
            self._stop.set()

    async def _drain(self) -> None:
        self.state.set_ready("the server is draining")
        await self._health.enter_graceful_shutdown()
        log_event(log, "draining", open_streams=self.state.open_streams, seconds=self._config.drain_seconds)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.state.idle.wait(), self._config.drain_seconds)
        log_event(log, "drained", cut_off_streams=self.state.open_streams)

    def _end_engine(self) -> bool:
        backend = self.state.loaded()
        if not backend.scheduler.close(LAST_WORDS_SECONDS):
            return False
        backend.engine.close()
        return True


def _load(load: Callable[[ServeConfig], TeacherEngine], config: ServeConfig) -> TeacherEngine:
    try:
        return load(config)
    except KVDistillError:
        raise
    except Exception as error:
        log_event(log, "load_failed", level=logging.ERROR, error=error, model=config.model)
        raise LoadError(f"model: '{config.model}' cannot be loaded: {type(error).__name__}: {error}") from error


async def _reported(load: Coroutine[None, None, ResultT], model: str) -> ResultT:
    """Awaits a model, and logs every so often that it still loads."""
    task, started = asyncio.create_task(load), time.monotonic()
    try:
        while not (await asyncio.wait({task}, timeout=LOADING_SECONDS))[0]:
            log_event(log, "loading", model=model, seconds=round(time.monotonic() - started, 3))
        return await task
    finally:
        task.cancel()


async def _in_daemon_thread(function: Callable[[], ResultT]) -> ResultT:
    """Awaits a function in a thread that does not keep a stopping process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[ResultT] = loop.create_future()

    def settle(result: ResultT | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        try:
            result, error = function(), None
        except BaseException as caught:  # noqa: BLE001  it is raised again where the future is awaited
            result, error = None, caught
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name="loader", daemon=True).start()
    return await future

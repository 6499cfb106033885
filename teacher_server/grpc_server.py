"""The gRPC server of a teacher: listens on a port, and restarts after a crash of gRPC's accept loop."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_health.v1.health import aio as health_aio  # pyright: ignore[reportAttributeAccessIssue]
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION_SERVICE
from grpc_reflection.v1alpha.reflection import enable_server_reflection

from kvcore.errors import FieldError, KVDistillError
from kvcore.wire.channel_arguments import DIRECT, server_arguments
from teacher_server.config import MIB
from teacher_server.monitoring.logs import log_event
from teacher_server.requests.authentication import certificate_files, read_tokens, server_credentials
from teacher_server.requests.call_interceptor import CallInterceptor
from teacher_server.requests.connection_limits import OpenServicesInterceptor, max_calls, max_streams
from teacher_server.requests.service import SERVICE, TeacherKVService
from teacher_server.state import ServerState

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 16 * MIB
MOST_CRASHES = 5
CRASH_WINDOW_SECONDS = 60.0
CRASH_CHECK_SECONDS = 0.25
BIND_SECONDS = 5.0
PROBE_SECONDS = 2.0


class GrpcCrashError(KVDistillError):
    """The gRPC server crashed too often."""

    next_step = "the events grpc_crashed in the server's log have the tracebacks; start the server again"


class GrpcServer:
    """A gRPC server on one port, replaced by a new one on the same port when it crashes.

    gRPC's accept loop ends at the first request that it cannot parse, such as one whose path is not UTF-8. The model
    stays loaded, and running calls continue. `watch` raises at the fifth crash within 60 seconds.

    Raises:
        FieldError: a certificate, key or token cannot be read.
    """

    def __init__(self, state: ServerState, service: TeacherKVService, health: health_aio.HealthServicer) -> None:
        self._state, self._service, self._health = state, service, health
        self._certificate = certificate_files(state.config)
        self._verify_clients = state.config.tls_client_ca is not None
        tokens = read_tokens(state.config)
        self._interceptor = CallInterceptor(
            SERVICE, state.metrics, state.activity, tokens, certificate_required=self._verify_clients
        )
        self._crashes: list[float] = []
        self._draining: dict[grpc.aio.Server, asyncio.Task[None]] = {}
        self._server: grpc.aio.Server | None = None
        self._loopback: grpc.aio.Channel | None = None

    async def start(self) -> None:
        """Listen, after a restart on the same port as before.

        Raises:
            FieldError: the port is taken.
        """
        config = self._state.config
        server = grpc.aio.server(
            interceptors=(self._interceptor, OpenServicesInterceptor(self._state.metrics)),
            options=server_arguments(MAX_REQUEST_BYTES, max_streams(config)),
            maximum_concurrent_rpcs=max_calls(config),
        )
        server.add_generic_rpc_handlers((self._service.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        enable_server_reflection((SERVICE, HEALTH_SERVICE, REFLECTION_SERVICE), server)
        self._state.grpc_port = self._listen(server)
        # The probe has its own address: a certificate need not name the loopback address. The interceptor refuses
        # other callers there: it asks for the token, and for the client's certificate if clients need one.
        loopback = f"unix-abstract:kvdistill-{secrets.token_hex(16)}"
        server.add_insecure_port(loopback)
        await server.start()
        self._server, self._loopback = server, grpc.aio.insecure_channel(loopback, options=[DIRECT])

    async def problem(self) -> str | None:
        """Probe the health service over loopback; returns what is wrong if it does not answer within 2 s."""
        assert self._loopback is not None, "start() comes first"
        check = health_pb2_grpc.HealthStub(self._loopback).Check  # pyright: ignore[reportAttributeAccessIssue]
        try:
            await check(health_pb2.HealthCheckRequest(), timeout=PROBE_SECONDS)
        except grpc.aio.AioRpcError as error:
            return f"the gRPC server does not answer: {error.code().name}"
        return None

    async def watch(self) -> None:
        """Replace the server whenever it crashes; returns when the server is stopped.

        Raises:
            GrpcCrashError: it crashed 5 times within 60 s.
            FieldError: the port was taken by another process in the meantime.
        """
        assert self._server is not None, "start() comes first"
        while True:
            try:
                # Without a timeout, gRPC reports a crash only after the last running call has ended.
                while await self._server.wait_for_termination(CRASH_CHECK_SECONDS):
                    pass
            except Exception as error:  # noqa: BLE001  gRPC's accept loop may raise anything
                await self._replace(error)
            else:
                return

    async def stop(self, grace_seconds: float) -> None:
        """End all calls within the grace period."""
        running = [self._server, *self._draining] if self._server is not None else []
        await asyncio.gather(*(server.stop(grace_seconds) for server in running), *self._draining.values())
        if self._loopback is not None:
            await self._loopback.close()

    async def _replace(self, error: Exception) -> None:
        assert self._server is not None
        assert self._loopback is not None
        now = time.monotonic()
        self._crashes = [then for then in self._crashes if now - then < CRASH_WINDOW_SECONDS] + [now]
        self._state.metrics.grpc_crashes.inc()
        self._state.grpc_problem = "the gRPC server crashed and is starting again"
        log_event(log, "grpc_crashed", level=logging.ERROR, error=error, crashes=len(self._crashes))
        self._drain(self._server)
        if len(self._crashes) >= MOST_CRASHES:
            raise GrpcCrashError(
                f"the gRPC server crashed {len(self._crashes)} times within {CRASH_WINDOW_SECONDS:g} s: {error}"
            ) from error
        loopback = self._loopback
        await self._start_again(give_up_at=now + BIND_SECONDS)
        await loopback.close(PROBE_SECONDS)
        self._state.grpc_problem = None
        log_event(log, "grpc_restarted", grpc_port=self._state.grpc_port)

    def _drain(self, server: grpc.aio.Server) -> None:
        """Let the calls of a crashed server finish."""
        task = asyncio.create_task(server.stop(self._state.config.max_request_seconds))
        self._draining[server] = task
        task.add_done_callback(lambda _task: self._draining.pop(server))

    async def _start_again(self, give_up_at: float) -> None:
        """Start, and retry while the port is not free yet."""
        while True:
            try:
                return await self.start()
            except FieldError:
                if time.monotonic() > give_up_at:
                    raise
            await asyncio.sleep(CRASH_CHECK_SECONDS)

    def _listen(self, server: grpc.aio.Server) -> int:
        config = self._state.config
        host = f"[{config.grpc_host}]" if ":" in config.grpc_host else config.grpc_host
        address = f"{host}:{self._state.grpc_port or config.grpc_port}"
        try:
            if self._certificate is None:
                return server.add_insecure_port(address)
            credentials = server_credentials(self._certificate, verify_clients=self._verify_clients)
            return server.add_secure_port(address, credentials)
        except RuntimeError as error:
            field = "grpc_port" if self._certificate is None else "tls_cert"
            raise FieldError(field, f"cannot listen on {address}: {error}") from error

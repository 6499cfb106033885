"""Tests of connections that never send a request, on both ports of a real server process."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2

from kvcore.monitoring.http_server import ACCEPTED_AT_ONCE, HEADER_SECONDS, MAX_CONNECTIONS
from tests.support.servers import TeacherProcess, health, running_teacher, wait_until

pytestmark = pytest.mark.slow

SOFT_LIMIT, CONNECTIONS = 1024, 1100


@pytest.fixture
def teacher(tmp_path: Path) -> Iterator[TeacherProcess]:
    """A server that starts with a low limit of open files, while this process may open more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT_LIMIT, hard))
    try:
        with running_teacher("fake:layers=2", tmp_path / "log", engine="fake") as running:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * CONNECTIONS), hard))
            yield running
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def half_open(port: int, stack: contextlib.ExitStack, start: bytes) -> None:
    connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
    with contextlib.suppress(OSError):  # the server may have closed it already
        connection.sendall(start)


def open_files(teacher: TeacherProcess) -> int:
    return len(list(Path(f"/proc/{teacher.pid}/fd").iterdir()))


def test_the_limit_of_open_files_is_raised(teacher: TeacherProcess) -> None:
    limits = Path(f"/proc/{teacher.pid}/limits").read_text(encoding="ascii")
    soft = next(line.split()[3] for line in limits.splitlines() if line.startswith("Max open files"))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert int(soft) == min(hard, 65_536)


@pytest.mark.parametrize("start", [b"", b"GET /healthz HTTP/1.1\r\nHost:"], ids=["silent", "half a header"])
def test_half_open_connections_stop_neither_port(teacher: TeacherProcess, start: bytes) -> None:
    before = open_files(teacher)
    with contextlib.ExitStack() as stack:
        for _ in range(CONNECTIONS):
            half_open(teacher.http_port, stack, start)
            # Some are accepted before the closed ones are gone.
            assert open_files(teacher) <= before + MAX_CONNECTIONS + 4 * ACCEPTED_AT_ONCE
        assert teacher.get("/healthz").status_code == 200
        for _ in range(CONNECTIONS):
            half_open(teacher.grpc_port, stack, b"")
        assert teacher.get("/healthz").status_code == 200
        wait_until(lambda: health_answers(teacher))
        wait_until(lambda: open_files(teacher) < before + 20, 5 * HEADER_SECONDS)
    assert "kvdistill_ready 1.0" in teacher.get("/metrics").text


def health_answers(teacher: TeacherProcess) -> bool:
    try:
        return health(teacher.endpoint) == health_pb2.HealthCheckResponse.SERVING
    except Exception:  # noqa: BLE001  the server may refuse connections for a while
        return False

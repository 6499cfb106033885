"""Tests of proxy variables in the environment: gRPC connects directly unless a proxy was asked for."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from kvcore.errors import TeacherUnavailableError
from student_trainer.kv_sources.remote import RemoteSource
from tests.support.kv_fakes import INFO, PLAN
from tests.support.scripted_teacher import ScriptedTeacher

VARIABLES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "grpc_proxy", "no_proxy", "no_grpc_proxy")


class Proxy:
    """Listens like a proxy, and refuses everything. `asked`: the first line of each request."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(4096).split(b"\r\n")[0])
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")

    def stop(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    running = Proxy()
    yield running
    running.stop()


def problem_of(endpoint: str) -> str:
    """Why the endpoint does not answer."""
    with (
        closing(RemoteSource("ada", endpoint, lambda _: PLAN)) as source,
        pytest.raises(TeacherUnavailableError) as bad,
    ):
        source.connect()
    return bad.value.problem


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_connections_within_the_machine_are_direct(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, proxy.url)
    teacher = ScriptedTeacher()
    for host in ("127.0.0.1", "localhost"):
        with closing(RemoteSource("ada", f"{host}:{teacher.port}", lambda _: PLAN)) as source:
            assert source.connect() == INFO
    teacher.stop()
    assert proxy.asked == []


def test_other_connections_use_a_proxy_only_if_grpc_proxy_asks_for_it(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = "teacher.invalid:50051"
    monkeypatch.setenv("http_proxy", proxy.url)
    problem = problem_of(endpoint)
    assert proxy.asked == []
    assert "connected directly, although http_proxy is set; grpc_proxy makes" in problem
    monkeypatch.setenv("grpc_proxy", proxy.url)
    assert "through the proxy that grpc_proxy names" in problem_of(endpoint)
    assert proxy.asked[0] == b"CONNECT teacher.invalid:50051 HTTP/1.1"


def test_without_variables_the_message_names_none() -> None:
    assert "proxy" not in problem_of("teacher.invalid:50051")

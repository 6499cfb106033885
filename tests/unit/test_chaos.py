"""Tests of the tools of `make chaos`: the comparison of two runs, and the proxy that damages connections."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.__main__ import differing_steps
from tests.chaos.tcp_proxy import Mode, TcpProxy
from tests.support.servers import wait_until
from tests.support.training import LOSSES

NAMES = (*LOSSES, "val/ce_loss", "val/kv_loss")


def write_run(directory: Path, losses: dict[int, float]) -> Path:
    directory.mkdir()
    lines = [json.dumps({"step": step, **dict.fromkeys(NAMES, loss)}) for step, loss in losses.items()]
    (directory / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return directory


def test_equal_runs_do_not_differ(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, {1: 0.5, 2: 0.25}) for name in ("a", "b")]
    assert differing_steps(*runs) == []


@pytest.mark.parametrize(
    ("losses", "step"), [({1: 0.5, 2: 0.25 + 1e-12}, 2), ({1: 0.5}, 2), ({1: 0.5, 2: 0.25, 3: 0.1}, 3)]
)
def test_another_loss_and_a_missing_step_are_differences(tmp_path: Path, losses: dict[int, float], step: int) -> None:
    calm, other = write_run(tmp_path / "calm", {1: 0.5, 2: 0.25}), write_run(tmp_path / "other", losses)
    assert differing_steps(calm, other) == sorted(f"{name} at {step}" for name in NAMES)


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it receives."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    while data := connection.recv(1 << 16):
                        connection.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def received(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += connection.recv(size)
    return data


def test_proxy_passes_holds_and_cuts(echo: int) -> None:
    with TcpProxy(echo, seed=0) as proxy, socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        connection.settimeout(10)
        connection.sendall(b"hello")
        assert received(connection, 5) == b"hello"
        proxy.mode = Mode.HOLD
        connection.sendall(b"later")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(10)
        proxy.mode = Mode.PASS
        assert received(connection, 5) == b"later"
        proxy.cut()
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""


def test_proxy_flips_single_bits(echo: int) -> None:
    with TcpProxy(echo, seed=0) as proxy, socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        connection.settimeout(10)
        proxy.mode = Mode.FLIP
        flipped = 0

        def damaged() -> bool:
            nonlocal flipped
            connection.sendall(bytes(64))
            flipped += sum(byte.bit_count() for byte in received(connection, 64))
            return flipped > 0

        wait_until(damaged)
        assert flipped == proxy.flips

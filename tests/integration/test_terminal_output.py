"""Tests of terminal output: colours, and the addresses of a server."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from tests.support.servers import REPOSITORY

SERVE = [sys.executable, "-m", "kvdistill", "serve", "--engine", "fake", "--model", "fake:layers=3"]


def on_terminal(command: list[str], until: str, **environment: str) -> str:
    """Run a command on a pseudo-terminal until it prints `until` or ends, and return its output."""
    reader, writer = pty.openpty()
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env={**inherited, "TERM": "xterm", **environment}, stdout=writer, stderr=writer
    )
    os.close(writer)
    shown, deadline = "", time.monotonic() + 60
    try:
        while until not in shown and time.monotonic() < deadline:
            shown += os.read(reader, 4096).decode()
    except OSError:  # The terminal's other end is closed: the process has ended.
        pass
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
        os.close(reader)
    return shown


def test_server_shows_its_addresses_and_logs_text() -> None:
    shown = on_terminal(SERVE, "ready grpc_port=")
    assert "gRPC         127.0.0.1:" in shown
    assert "Status page  http://127.0.0.1:" in shown
    assert "INFO listening grpc_port=" in shown
    assert '"event"' not in shown


@pytest.mark.parametrize(
    ("environment", "start"), [({}, "\x1b[1;31merror:\x1b[0m --dtype: "), ({"NO_COLOR": "1"}, "kvdistill: --dtype: ")]
)
def test_error_is_one_line_in_colour_unless_no_color_is_set(environment: dict[str, str], start: str) -> None:
    shown = on_terminal([*SERVE, "--dtype", "fp31"], "no such text", **environment)
    assert shown == f"{start}expected one of auto, fp32, bf16, fp16; got 'fp31'; did you mean 'fp32'?\r\n"

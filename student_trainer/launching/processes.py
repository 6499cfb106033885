"""Child processes: started with a log, ended with their parent. Does not import torch."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

STOP_SECONDS = 20.0
_TAIL_LINES = 25
_PR_SET_PDEATHSIG = 1


def start_logged(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, *, pipe: bool = False
) -> subprocess.Popen[str]:
    """Starts a command with its output in `log`, or in a pipe.

    Args:
        command: program and arguments.
        log: the file is emptied, and its folder created.
        environment: variables added to this process's own.
        pipe: send the output to a pipe; the caller reads it and writes the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipe else file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            text=True,
            encoding="utf-8",
            errors="replace",
        )


def killed_with_parent(command: Sequence[str]) -> list[str]:
    """Wraps a command so that it gets SIGTERM when this process ends for any reason, kill -9 included. Linux only."""
    return [sys.executable, "-m", "student_trainer.launching.processes", str(os.getpid()), *command]


def end(*processes: subprocess.Popen[str]) -> None:
    """Sends SIGTERM to all processes, and SIGKILL to those that still run after STOP_SECONDS."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    wait_all(processes, STOP_SECONDS)
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_all(processes: Sequence[subprocess.Popen[str]], seconds: float) -> None:
    """Waits until all processes have ended, at most `seconds`."""
    give_up_at = time.monotonic() + seconds
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, give_up_at - time.monotonic()))


def free_port() -> int:
    """A TCP port of this machine that is free at the moment."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Makes SIGTERM unwind the stack inside the block, so that child processes are ended and waited for."""

    def leave(*_: object) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def tail(log: Path) -> str:
    """The last lines of a log, indented."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-_TAIL_LINES:])


def _die_with_parent(parent: int, command: list[str]) -> None:
    """Replaces this process by `command`, which ends with `parent`. The setting survives exec."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        # The parent ended before the setting was made.
        sys.exit(0)
    os.execvp(command[0], command)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    _die_with_parent(int(sys.argv[1]), sys.argv[2:])

"""Child processes whose output goes to a log, and that do not outlive whoever started them. Free of torch."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

STOP_SECONDS = 20.0
_TAIL_LINES = 25
_PR_SET_PDEATHSIG = 1


def start_logged(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, *, pipe: bool = False
) -> subprocess.Popen[str]:
    """Starts a command with its output in `log` (emptied first), or in a pipe.

    Args:
        command: program and arguments.
        log: its folder is made.
        environment: added to this process's own.
        pipe: the output is for the caller to read, and the log for the caller to write.
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
    """The command that gets SIGTERM when this process ends in whatever way, kill -9 included. Linux only."""
    return [sys.executable, "-m", "student_trainer.launching.processes", str(os.getpid()), *command]


def end(process: subprocess.Popen[str]) -> None:
    """Asks a process to end, and makes it if it does not."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Inside the block SIGTERM unwinds the stack, so that what was started is told to end, and waited for."""

    def leave(*_: object) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def tail(log: Path) -> str:
    """The last lines of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-_TAIL_LINES:])


def _die_with_parent(parent: int, command: list[str]) -> None:
    """Turns this process into `command`, which ends with `parent`. The setting survives exec."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        # It ended before the setting was made.
        sys.exit(0)
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    _die_with_parent(int(sys.argv[1]), sys.argv[2:])

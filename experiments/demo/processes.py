"""The demo's child processes: teacher servers and training runs. Whatever is started here is ended here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Self

from kvcore.errors import KVDistillError

READY_SECONDS = 180.0
STOP_SECONDS = 20.0
_TAIL_LINES = 25
# The same on every machine: no accelerator, and one thread a process, as there are as many processes as cores.
CPU_ONLY = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}


class DemoError(KVDistillError):
    """A part of the demo broke."""


def run_logged(command: list[str], log: Path, on_line: Callable[[str], None] = lambda _line: None) -> None:
    """Runs a command to its end, its output going to `log` and line by line to `on_line`.

    Raises:
        DemoError: it failed; with the end of its log.
    """
    with start_logged(command, log, pipe=True) as process:
        try:
            assert process.stdout is not None
            with log.open("a", encoding="utf-8") as file:
                for line in process.stdout:
                    file.write(line)
                    file.flush()
                    on_line(line.rstrip("\n"))
        except BaseException:
            end(process)
            raise
    check(process, command, log)


def start_logged(command: list[str], log: Path, *, pipe: bool = False) -> subprocess.Popen[str]:
    """Starts a command with its output in `log` (emptied first), or in a pipe."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipe else file,
            stderr=subprocess.STDOUT,
            env=os.environ | CPU_ONLY,
            text=True,
            encoding="utf-8",
            errors="replace",
        )


def check(process: subprocess.Popen[str], command: list[str], log: Path) -> None:
    """Raises where an ended process failed."""
    if process.returncode != 0:
        shown = " ".join(command[1:])
        raise DemoError(f"`{shown}` ended with code {process.returncode}; the end of {log}:\n{tail(log)}")


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


def tail(log: Path) -> str:
    """The last lines of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-_TAIL_LINES:])


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment, all different."""
    held = [socket.socket() for _ in range(count)]
    try:
        for listener in held:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in held]
    finally:
        for listener in held:
            listener.close()


class TeacherServer:
    """One `kvdistill serve` process, ended on leaving the block.

    Args:
        name: what the teacher calls itself.
        model: its directory.
        log: where its output goes.
    """

    def __init__(self, name: str, model: Path, log: Path) -> None:
        self.name = name
        self.grpc_port, self._http_port = free_ports(2)
        self._model, self._log = model, log
        self._process: subprocess.Popen[str] | None = None
        self.peak_memory_mb = 0.0

    def __enter__(self) -> Self:
        ports = ["--grpc-port", str(self.grpc_port), "--http-port", str(self._http_port)]
        arguments = ["--engine", "hf", "--model", str(self._model), "--name", self.name, "--device", "cpu"]
        command = [sys.executable, "-m", "kvdistill", "serve", *arguments, "--dtype", "fp32", "--threads", "1", *ports]
        self._process = start_logged(command, self._log)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._measure()
            end(self._process)

    def wait_ready(self) -> None:
        """Returns when the server answers /readyz with 200.

        Raises:
            DemoError: it died, or was not ready in time; with the end of its log.
        """
        deadline = time.monotonic() + READY_SECONDS
        while not self._answers_ready():
            self.check_alive()
            if time.monotonic() > deadline:
                raise DemoError(f"{self.name} was not ready after {READY_SECONDS:.0f} s; {self._last_words()}")
            time.sleep(0.2)

    def check_alive(self) -> None:
        """Raises a DemoError, with the end of the server's log, if it has died."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise DemoError(f"{self.name}'s server ended with code {self._process.returncode}; {self._last_words()}")
        self._measure()

    def _measure(self) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            return
        for line in Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                self.peak_memory_mb = int(line.split()[1]) / 1024

    def _answers_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._http_port}/readyz", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _last_words(self) -> str:
        return f"the end of {self._log}:\n{tail(self._log)}"

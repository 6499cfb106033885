"""Starts teacher servers, waits until they are ready, notices lost ones, and ends them. Does not import torch."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcore.errors import ConfigError, TeacherUnavailableError
from student_trainer.launching.hosts import SERVER, Hosts
from student_trainer.launching.placement import Node
from student_trainer.launching.processes import end, tail, wait_all

logger = logging.getLogger(__name__)

# Loading a 70B model from a shared disk takes most of an hour.
READY_SECONDS = 3600.0
# Longer than `kvdistill serve` gives to running requests (--drain-seconds).
DRAIN_SECONDS = 60.0
POLL_SECONDS = 0.2
_REPORT_SECONDS = 15.0


@dataclass(slots=True)
class _Server:
    """One `kvdistill serve` process; `endpoint` is empty until it is ready."""

    teacher: str
    node: Node
    log: Path
    process: subprocess.Popen[str]
    endpoint: str = ""
    reported_lost: bool = False

    def lost(self, problem: str) -> TeacherUnavailableError:
        return TeacherUnavailableError(
            self.teacher, f"its server on {self.node.name} {problem}; the end of {self.log}:\n{tail(self.log)}"
        )


class TeacherServers:
    """`kvdistill serve` processes on the nodes of a job or on this machine.

    Args:
        hosts: where servers run.
        log_dir: the folder of the logs `serve_NAME.log`, and `serve_NAME.N.log` for further replicas.
    """

    def __init__(self, hosts: Hosts, log_dir: Path) -> None:
        self._hosts, self._log_dir = hosts, log_dir
        self._servers: list[_Server] = []
        self.access: Sequence[str] = ()
        """Further flags of every server: how callers reach it."""

    @property
    def processes(self) -> list[tuple[str, subprocess.Popen[str]]]:
        """Each server's teacher and process, in the order of their start."""
        return [(server.teacher, server.process) for server in self._servers]

    def start(
        self, teacher: str, node: Node, flags: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        """Starts a server on ports that the system picks.

        Args:
            teacher: the teacher's name; a second server of the same name is a replica.
            node: where the server runs.
            flags: further arguments of `kvdistill serve`, `--model` among them.
            environment: variables added to this process's own.
        """
        replica = sum(server.teacher == teacher for server in self._servers)
        log = self._log_dir / f"serve_{teacher}{f'.{replica}' if replica else ''}.log"
        ports = ["--grpc-host", self._hosts.bind, "--grpc-port", "0", "--http-port", "0", *self.access]
        command = [sys.executable, "-m", "kvdistill", "serve", "--name", teacher, *ports, *flags]
        logger.info("serving %s on %s; log: %s", teacher, node.name, log)
        process = self._hosts.start(SERVER, command, node, log, environment)
        self._servers.append(_Server(teacher, node, log, process))

    def wait_ready(
        self, seconds: float = READY_SECONDS, interrupt: Callable[[], None] = lambda: None
    ) -> dict[str, list[str]]:
        """Waits until all servers have passed their self-test; returns each teacher's endpoints.

        Args:
            seconds: how long loading may take.
            interrupt: called while waiting; its exceptions end the wait.

        Raises:
            TeacherUnavailableError: a server ended or was not ready in time; with the end of its log.
        """
        started = reported = time.monotonic()
        while waiting := [server for server in self._servers if not _is_ready(server)]:
            interrupt()
            self.check_alive()
            now = time.monotonic()
            if now - started > seconds:
                raise waiting[0].lost(f"was not ready after {seconds:.0f} s")
            if now - reported > _REPORT_SECONDS:
                reported = now
                names = ", ".join(server.teacher for server in waiting)
                logger.info("waiting for %s to load (%.0f s)", names, now - started)
            time.sleep(POLL_SECONDS)
        endpoints: dict[str, list[str]] = {}
        for server in self._servers:
            endpoints.setdefault(server.teacher, []).append(server.endpoint)
        return endpoints

    def check_alive(self) -> None:
        """Raises a TeacherUnavailableError, with the end of the log, if a server has ended."""
        for server in self._servers:
            if server.process.poll() is not None:
                raise server.lost(f"ended with code {server.process.returncode}")

    def report_lost(self) -> None:
        """Logs each server that has ended, once. The trainer decides whether it can continue without it."""
        for server in self._servers:
            if server.process.poll() is not None and not server.reported_lost:
                server.reported_lost = True
                logger.warning("%s", server.lost(f"ended with code {server.process.returncode}"))

    def stop(self, seconds: float = DRAIN_SECONDS) -> None:
        """Asks the servers to finish running requests and end; ends those that take longer than `seconds`."""
        processes = [server.process for server in self._servers]
        try:
            self._hosts.send_signal(SERVER, processes, signal.SIGTERM)
            wait_all(processes, seconds)
        except ConfigError as error:
            # SLURM may already be ending the job's processes, squeue among them. Do not hide why the job ends.
            logger.warning("%s; the servers are ended without draining", error)
        end(*processes)
        self._servers.clear()


def _is_ready(server: _Server) -> bool:
    """Whether the server's log says that it takes requests; sets the endpoint."""
    if not server.endpoint and (event := find_event(server.log, "ready")):
        server.endpoint = f"{server.node.address}:{event['grpc_port']}"
    return bool(server.endpoint)


def find_event(log: Path, name: str) -> dict[str, Any] | None:
    """Returns the first event of that name in a server's log. Skips lines that libraries write."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if f'"{name}"' not in line:
            continue
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            # The server is still writing this line.
            continue
        if isinstance(event, dict) and event.get("event") == name:
            return event
    return None


def as_arguments(flags: Mapping[str, object]) -> list[str]:
    """Turns flags into command-line arguments. None and False omit a flag; True gives it without a value."""
    arguments: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        arguments.append(f"--{name.replace('_', '-')}")
        if value is not True:
            arguments.append(str(value))
    return arguments

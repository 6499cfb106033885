"""A job of teacher servers and ranks: its signals, its end, and its exit status. Does not import torch."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from kvcore.command_line import run_command
from kvcore.errors import FieldError, KVDistillError
from student_trainer.launching.credentials import Credentials, brings_own_access, create_credentials
from student_trainer.launching.endpoints import write_endpoints
from student_trainer.launching.hosts import TRAINER, Hosts
from student_trainer.launching.placement import Placement
from student_trainer.launching.processes import end
from student_trainer.launching.teacher_servers import DRAIN_SECONDS, POLL_SECONDS, READY_SECONDS, TeacherServers

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

Processes = Sequence[subprocess.Popen[str]]


class JobError(KVDistillError):
    """A process of the job failed."""


class StoppedError(KVDistillError):
    """A signal ended the job."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"ended by {number.name}")
        self.number = number


class Job:
    """The processes of one job.

    READY_SECONDS and DRAIN_SECONDS in the environment limit how long servers may load, and how long they may take to
    finish running requests.

    Args:
        hosts: where processes run.
        log_dir: the parent of the job's folder of logs.

    Raises:
        FieldError: READY_SECONDS or DRAIN_SECONDS is not a number.
    """

    def __init__(self, hosts: Hosts, log_dir: Path) -> None:
        self.hosts, self.log_dir = hosts, log_dir / hosts.job_name
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self.servers = TeacherServers(hosts, self.log_dir)
        self.signalled: signal.Signals | None = None
        """The first signal that the job got."""
        self._ready_seconds = _seconds("READY_SECONDS", READY_SECONDS)
        self._drain_seconds = _seconds("DRAIN_SECONDS", DRAIN_SECONDS)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Notes signals inside the block, ends the servers after it, and requeues a job that SIGUSR1 stopped.

        Raises:
            StoppedError: a signal ended the job.
        """
        handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            try:
                yield
            finally:
                self.servers.stop(self._drain_seconds)
        except StoppedError as stopped:
            # SLURM sends SIGUSR1 when the job's time is nearly over. After SIGTERM its sender decides what happens.
            if stopped.number == signal.SIGUSR1:
                # This comes last, since it ends whatever the job still runs.
                self.hosts.requeue()
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def protect_servers(self, flags: Sequence[str] = (), token: Path | None = None) -> Credentials | None:
        """Makes a certificate and a token for the servers that are started from now on, if other machines reach them.

        The processes of this job get the variables with which commands find both files.

        Args:
            flags: of all servers; if they name such files or `--insecure`, nothing is made.
            token: an existing token to use instead of a new one.

        Raises:
            ConfigError: openssl is missing or failed.
        """
        if not self.hosts.shared or brings_own_access(flags):
            return None
        addresses = [name for node in self.hosts.nodes for name in (node.address, node.name)]
        made = create_credentials(self.log_dir / "access", addresses, token)
        self.servers.access = made.server_flags
        os.environ.update(made.variables)
        logger.info("the servers use TLS and a token: %s", made.certificate.parent)
        return made

    def wait_ready(self) -> dict[str, list[str]]:
        """Waits until all servers are ready; returns each teacher's endpoints.

        Raises:
            StoppedError: the job got a signal.
            TeacherUnavailableError: a server ended or was not ready in time.
        """
        return self.servers.wait_ready(self._ready_seconds, self.check_signals)

    def wait_until(self, condition: Callable[[], bool], problem: str) -> None:
        """Waits until a condition holds.

        Raises:
            JobError: it does not hold in READY_SECONDS; the message is `problem`.
        """
        give_up_at = time.monotonic() + self._ready_seconds
        while not condition():
            self.check_signals()
            if time.monotonic() > give_up_at:
                raise JobError(f"{problem} after {self._ready_seconds:.0f} s")
            time.sleep(POLL_SECONDS)

    def watch_servers(self) -> NoReturn:
        """Raises a StoppedError when a signal arrives, a TeacherUnavailableError when a server ends."""
        while True:
            self.check_signals()
            self.servers.check_alive()
            time.sleep(POLL_SECONDS)

    def train(self, command: Sequence[str], placement: Placement, endpoints: Mapping[str, Sequence[str]]) -> None:
        """Runs the ranks to their end. Writes the endpoints to `endpoints_file`, if there are any.

        Raises:
            JobError: a rank failed.
            StoppedError: the ranks saved a checkpoint and ended after a signal.
        """
        if endpoints:
            write_endpoints(self.endpoints_file, endpoints)
            logger.info("teachers: %s", ", ".join(f"{name}={','.join(found)}" for name, found in endpoints.items()))
        self.wait(self.hosts.start_ranks(command, placement), "training", self._save_and_end)

    @property
    def endpoints_file(self) -> Path:
        """Where `train` writes the endpoints."""
        return self.log_dir / "endpoints.txt"

    def wait(self, processes: Processes, task: str, on_signal: Callable[[Processes], None]) -> None:
        """Waits for all processes; the first that fails ends the others.

        Args:
            processes: those to wait for.
            task: names what they do in the error.
            on_signal: called once if the job gets a signal.

        Raises:
            JobError: a process failed.
            StoppedError: a process failed after a signal.
        """
        notified = False
        try:
            while True:
                codes = [process.poll() for process in processes]
                failed = [code for code in codes if code]
                if failed:
                    self.check_signals()
                    raise JobError(f"{task} failed with code {failed[0]}; its message is above")
                if all(code == 0 for code in codes):
                    return
                if self.signalled and not notified:
                    notified = True
                    on_signal(processes)
                if not self.signalled:
                    self.servers.report_lost()
                time.sleep(POLL_SECONDS)
        finally:
            end(*processes)

    def check_signals(self) -> None:
        """Raises a StoppedError if the job got a signal."""
        if self.signalled:
            raise StoppedError(self.signalled)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signalled = self.signalled or signal.Signals(number)

    def _save_and_end(self, ranks: Processes) -> None:
        """Asks the ranks to save a checkpoint and end.

        SLURM may have sent the job's signal to the ranks too, and a second signal of the same kind ends them at once.
        So they get the other one of the two that ask for a checkpoint.
        """
        assert self.signalled is not None
        logger.info("%s: asking the ranks to save a checkpoint and end", self.signalled.name)
        other = signal.SIGTERM if self.signalled == signal.SIGINT else signal.SIGINT
        self.hosts.send_signal(TRAINER, ranks, other)


def exit_status(program: str, run: Callable[[], None]) -> int:
    """Runs a job with its log on stdout and its error on stderr; returns the exit status for SLURM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)

    def command() -> int | None:
        try:
            run()
        except StoppedError as stopped:
            logger.info("%s", stopped)
            return 128 + stopped.number
        return None

    return run_command(program, command)


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable) or str(default)
    try:
        return float(text)
    except ValueError as error:
        raise FieldError(variable, f"expected a number of seconds, got '{text}'") from error

"""Faults of replicas and of the trainer. Each begins, lasts some seconds, and ends."""

from __future__ import annotations

import resource
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos.tcp_proxy import Mode, TcpProxy
from tests.support.servers import ServerStartError, TeacherProcess, start_teacher

# A rank can still write its log, but no tensors, and soon no metrics.
_FULL_DISK_BYTES = 1 << 15


@dataclass(eq=False)
class Replica:
    """A teacher server behind a proxy. Restarts keep its port.

    `model` is the right model, `wrong_model` has other weights.
    """

    name: str
    model: Path
    wrong_model: Path
    directory: Path
    grpc_port: int
    proxy: TcpProxy
    starts: int = 0
    process: TeacherProcess = field(init=False)

    def start(self, model: Path | None = None) -> None:
        """Start a server on the replica's port, and return at once."""
        self.starts += 1
        log = self.directory / f"{self.name}-{self.starts}.log"
        # Samples that run alone give the same K/V in every run.
        self.process = start_teacher(model or self.model, log, grpc_port=self.grpc_port, max_batch_tokens=1)

    def is_ready(self) -> bool:
        """Whether its newest process has finished starting.

        Raises:
            ServerStartError: the process ended.
        """
        if self.process.process.poll() is not None:
            raise ServerStartError(f"{self.name} ended while it started; see {self.process.log_path}")
        return bool(self.process.events("ready"))

    def stop(self) -> None:
        """End the process in any state."""
        if self.process.process.poll() is None:
            self.process.signal(signal.SIGCONT)
            self.process.kill()

    def drain(self) -> None:
        """Let the process end by itself after SIGTERM."""
        self.process.stop()


@dataclass(frozen=True)
class Fault:
    """`begin` and `end` take the replica.

    `weight`: how often it is chosen, relative to the others. `starts`: it begins with a server that starts, and lasts
    from when that is ready.
    """

    name: str
    begin: Callable[[Replica], None]
    end: Callable[[Replica], None]
    weight: int = 2
    starts: bool = False


def _set_mode(mode: Mode) -> Callable[[Replica], None]:
    def apply(replica: Replica) -> None:
        replica.proxy.mode = mode

    return apply


def _pass_again(replica: Replica) -> None:
    replica.proxy.mode = Mode.PASS


def _flip_no_more(replica: Replica) -> None:
    _pass_again(replica)
    # A connection whose framing was damaged may wait for ever.
    replica.proxy.cut()


def _send(number: signal.Signals) -> Callable[[Replica], None]:
    return lambda replica: replica.process.signal(number)


def _lie(replica: Replica) -> None:
    replica.stop()
    replica.start(replica.wrong_model)


def _tell_the_truth(replica: Replica) -> None:
    replica.stop()
    replica.start()


def _drain_and_start(replica: Replica) -> None:
    replica.drain()
    replica.start()


REPLICA_FAULTS = (
    Fault("killed", Replica.stop, Replica.start),
    Fault("stopped (SIGSTOP)", _send(signal.SIGSTOP), _send(signal.SIGCONT)),
    Fault("drains (SIGTERM)", _send(signal.SIGTERM), _drain_and_start),
    Fault("unreachable: packets are held", _set_mode(Mode.HOLD), _pass_again),
    Fault("connections cut", lambda replica: replica.proxy.cut(), lambda _: None, weight=3),
    Fault("bits flip in both directions", _set_mode(Mode.FLIP), _flip_no_more, weight=4),
    Fault("slow", _set_mode(Mode.SLOW), _pass_again),
    Fault("serves other weights", _lie, _tell_the_truth, starts=True),
)


def kill_trainer(trainer: subprocess.Popen[bytes]) -> None:
    """kill -9 of the launcher and all ranks."""
    for process in _family(trainer):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def fill_disk(trainer: subprocess.Popen[bytes]) -> None:
    """Let every later write of a long file fail, as on a full disk."""
    for process in _family(trainer):
        with suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (_FULL_DISK_BYTES, resource.RLIM_INFINITY))


TRAINER_FAULTS = (("trainer: killed", kill_trainer), ("trainer: its disk is full", fill_disk))


def _family(trainer: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        launcher = psutil.Process(trainer.pid)
        return [launcher, *launcher.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []

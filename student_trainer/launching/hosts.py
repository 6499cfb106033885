"""The machines that a job runs on: `LocalHost` is this machine. Does not import torch."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from student_trainer.launching.placement import Node, Placement
from student_trainer.launching.processes import free_port, killed_with_parent, start_logged

logger = logging.getLogger(__name__)

# Names of the job's steps: all processes of a step get a signal together.
TRAINER, SERVER = "trainer", "server"


class Hosts(ABC):
    """Starts processes on nodes and sends signals to them.

    Attributes:
        nodes: the machines; the first is this one.
        job_name: names the job's folder of logs.
        bind: the address that servers listen on.
        shared: whether other machines can reach the servers, so that they need a certificate and a token.
    """

    nodes: tuple[Node, ...]
    job_name: str
    bind: str
    shared: bool

    @abstractmethod
    def start(
        self, step: str, command: Sequence[str], node: Node, log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Starts one process on a node; its output goes to `log`. `environment` is added to this process's own."""

    @abstractmethod
    def start_ranks(self, command: Sequence[str], placement: Placement) -> list[subprocess.Popen[str]]:
        """Starts the training processes with torchrun's variables; they inherit this process's output."""

    @abstractmethod
    def send_signal(self, step: str, processes: Sequence[subprocess.Popen[str]], number: signal.Signals) -> None:
        """Sends a signal to every process of a step. `processes` are those that `start` or `start_ranks` returned."""

    @abstractmethod
    def requeue(self) -> None:
        """Queues the job again, if there is a scheduler."""


class LocalHost(Hosts):
    """This machine, without a scheduler."""

    def __init__(self) -> None:
        self.nodes = (Node("localhost", "127.0.0.1"),)
        self.job_name = time.strftime("local-%Y%m%d-%H%M%S")
        self.bind = "127.0.0.1"
        self.shared = False

    def start(
        self, step: str, command: Sequence[str], node: Node, log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """See `Hosts.start`."""
        del step, node
        return start_logged(killed_with_parent(command), log, environment)

    def start_ranks(self, command: Sequence[str], placement: Placement) -> list[subprocess.Popen[str]]:
        """See `Hosts.start_ranks`."""
        count = placement.ranks_per_node
        shared = {
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
        command = killed_with_parent([*visible_gpus(placement), *command])
        return [start_rank(command, {**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in range(count)]

    def send_signal(self, step: str, processes: Sequence[subprocess.Popen[str]], number: signal.Signals) -> None:
        """See `Hosts.send_signal`."""
        del step
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    def requeue(self) -> None:
        """See `Hosts.requeue`."""
        logger.info("run the same command again to continue from the checkpoint")


def start_rank(command: Sequence[str], environment: Mapping[str, object]) -> subprocess.Popen[str]:
    """Starts a command with more variables; it inherits this process's output."""
    added = {name: str(value) for name, value in environment.items()}
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, **added}, text=True)


def visible_gpus(placement: Placement) -> list[str]:
    """The prefix of a rank's command that hides the GPUs of servers on the same node."""
    if placement.gpus is None:
        return []
    return ["env", f"CUDA_VISIBLE_DEVICES={','.join(map(str, placement.gpus))}"]

"""Where a job's processes run: the nodes of a SLURM allocation, or this machine. Free of torch."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvcore.errors import ConfigError
from student_trainer.launching.placement import Node, Placement
from student_trainer.launching.processes import STOP_SECONDS, end, killed_with_parent, start_logged

logger = logging.getLogger(__name__)

_TRAINER, _SERVER = "trainer", "server"
_POLL_SECONDS = 0.2
# What every launcher of ranks sets; srun numbers its tasks by variables of its own.
_AS_RANK = (
    "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; "
    'export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES)); exec "$@"'
)


class Hosts(ABC):
    """Starts processes on nodes, and passes on signals to them."""

    nodes: tuple[Node, ...]
    gpus: int
    name: str
    # What servers listen on.
    bind: str

    @abstractmethod
    def start_server(self, command: Sequence[str], node: Node, log: Path) -> subprocess.Popen[str]:
        """Starts one process on a node; its output goes to `log`."""

    @abstractmethod
    def start_ranks(self, command: Sequence[str], layout: Placement) -> list[subprocess.Popen[str]]:
        """Starts the training processes; their output goes where this process's goes."""

    @abstractmethod
    def stop_ranks(self, ranks: Sequence[subprocess.Popen[str]], number: signal.Signals) -> None:
        """Asks the ranks to save a checkpoint and end, since this process got `number`.

        They may have got the same signal from whoever sent it, and end at once when a signal comes twice: so another
        one of those that mean the same is sent.
        """

    def stop_servers(self, servers: Sequence[subprocess.Popen[str]]) -> None:
        """Asks servers to answer what they have begun and end, and returns when they have."""
        end_all(servers)

    @abstractmethod
    def requeue(self) -> None:
        """Asks for the job to be run again."""


class LocalHost(Hosts):
    """Everything here, without a scheduler."""

    def __init__(self, gpus: int) -> None:
        self.nodes = (Node("here", "127.0.0.1"),)
        self.gpus = gpus
        self.name = time.strftime("local-%Y%m%d-%H%M%S")
        self.bind = "127.0.0.1"

    def start_server(self, command: Sequence[str], node: Node, log: Path) -> subprocess.Popen[str]:
        """See `Hosts.start_server`."""
        assert node in self.nodes
        return start_logged(killed_with_parent(command), log)

    def start_ranks(self, command: Sequence[str], layout: Placement) -> list[subprocess.Popen[str]]:
        """See `Hosts.start_ranks`."""
        count = layout.ranks_per_node
        shared = {
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
        return [
            _start(killed_with_parent([*_visible(layout), *command]), {**shared, "RANK": rank, "LOCAL_RANK": rank})
            for rank in range(count)
        ]

    def stop_ranks(self, ranks: Sequence[subprocess.Popen[str]], number: signal.Signals) -> None:
        """See `Hosts.stop_ranks`."""
        for process in ranks:
            if process.poll() is None:
                process.send_signal(_other(number))

    def requeue(self) -> None:
        """See `Hosts.requeue`. Nobody here would run it again."""
        logger.info("the same command goes on from the checkpoint")


class SlurmHosts(Hosts):
    """The nodes of the allocation that this process runs in.

    Raises:
        ConfigError: there is none.
    """

    def __init__(self, gpus: int) -> None:
        if "SLURM_JOB_ID" not in os.environ:
            raise ConfigError("this is no SLURM job: submit the script with sbatch, or add --local to run it here")
        self.job = os.environ["SLURM_JOB_ID"]
        self.gpus = gpus
        restart = os.environ.get("SLURM_RESTART_COUNT", "0")
        again = f".{restart}" if restart != "0" else ""
        self.name = f"{os.environ.get('SLURM_JOB_NAME', 'job')}-{self.job}{again}"
        self.bind = "0.0.0.0"  # noqa: S104 - ranks on other nodes pull from here
        names = _output(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]).split()
        self.nodes = tuple(Node(name, _address(name)) for name in names)

    def start_server(self, command: Sequence[str], node: Node, log: Path) -> subprocess.Popen[str]:
        """See `Hosts.start_server`."""
        return start_logged(killed_with_parent([*self._srun(_SERVER, [node], 1), *command]), log)

    def start_ranks(self, command: Sequence[str], layout: Placement) -> list[subprocess.Popen[str]]:
        """See `Hosts.start_ranks`."""
        srun = self._srun(_TRAINER, layout.trainers, layout.ranks_per_node)
        ranks = ["bash", "-c", _AS_RANK, "rank", *_visible(layout), *command]
        master = {"MASTER_ADDR": layout.trainers[0].address, "MASTER_PORT": free_port()}
        return [_start(killed_with_parent([*srun, *ranks]), master)]

    def stop_ranks(self, ranks: Sequence[subprocess.Popen[str]], number: signal.Signals) -> None:
        """See `Hosts.stop_ranks`. A signal to srun itself would end its tasks at once."""
        del ranks
        self._signal_steps(_TRAINER, _other(number))

    def stop_servers(self, servers: Sequence[subprocess.Popen[str]]) -> None:
        """See `Hosts.stop_servers`."""
        try:
            self._signal_steps(_SERVER, signal.SIGTERM)
        except ConfigError as error:
            # SLURM may be ending the job's processes, squeue among them; why it ends matters more.
            logger.warning("%s; the servers are ended without draining", error)
            end_all(servers)
        give_up_at = time.monotonic() + STOP_SECONDS
        while any(server.poll() is None for server in servers) and time.monotonic() < give_up_at:
            time.sleep(_POLL_SECONDS)
        end_all(servers)

    def requeue(self) -> None:
        """See `Hosts.requeue`.

        Raises:
            ConfigError: SLURM refuses.
        """
        logger.info("asking SLURM to run job %s again", self.job)
        command = ["scontrol", "requeue", self.job]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        # Below 0 it was ended by a signal: SLURM is ending the whole job already.
        if done.returncode > 0:
            raise ConfigError(
                f"SLURM does not requeue job {self.job} ({done.stderr.strip()}); submitted again, it goes on from the "
                "checkpoint"
            )

    def _signal_steps(self, name: str, number: signal.Signals) -> None:
        steps = _output(["squeue", "--steps", "--noheader", "--jobs", self.job, "--format", "%i %j"]).splitlines()
        for step in (step.split() for step in steps):
            if step[1:] == [name]:
                # It may have ended by itself; and SLURM 22.05 reports an error for a signal that it has delivered.
                command = ["scancel", f"--signal={number.name[3:]}", step[0]]
                subprocess.run(command, check=False, capture_output=True)

    def _srun(self, name: str, nodes: Sequence[Node], tasks_per_node: int) -> list[str]:
        cpus = int(os.environ.get("SLURM_CPUS_ON_NODE", "1"))
        return [
            _which("srun"),
            # sbatch --export=A=... would have srun pass nothing else.
            "--export=ALL",
            f"--job-name={name}",
            "--overlap",
            "--mem=0",
            f"--nodes={len(nodes)}",
            f"--ntasks={len(nodes) * tasks_per_node}",
            f"--ntasks-per-node={tasks_per_node}",
            f"--cpus-per-task={max(1, cpus // tasks_per_node)}",
            f"--nodelist={','.join(node.name for node in nodes)}",
            "--kill-on-bad-exit=1",
            "--unbuffered",
        ]


def end_all(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Ends what still runs: all are asked before the first is waited for."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        end(process)


def free_port() -> int:
    """A port of this machine that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def _other(number: signal.Signals) -> signal.Signals:
    return signal.SIGTERM if number == signal.SIGINT else signal.SIGINT


def _visible(layout: Placement) -> list[str]:
    """Hides the servers' GPUs from ranks on the same node."""
    if layout.gpus is None:
        return []
    return [_which("env"), f"CUDA_VISIBLE_DEVICES={','.join(map(str, layout.gpus))}"]


def _start(command: Sequence[str], environment: Mapping[str, object]) -> subprocess.Popen[str]:
    added = {name: str(value) for name, value in environment.items()}
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, **added}, text=True)


def _address(node: str) -> str:
    """Where a node is reached: its name need not be known to the resolver."""
    found = re.search(r"\bNodeAddr=(\S+)", _output(["scontrol", "show", "node", node]))
    return found.group(1) if found else node


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise ConfigError(f"`{' '.join(command)}` failed: {said}") from error


def _which(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise ConfigError(f"{program} is not on the PATH")
    return found

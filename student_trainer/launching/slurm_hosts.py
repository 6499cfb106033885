"""The nodes of a SLURM allocation, whose processes are steps of the job. Does not import torch."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvcore.errors import ConfigError
from student_trainer.launching.hosts import TRAINER, Hosts, start_rank, visible_gpus
from student_trainer.launching.placement import Node, Placement
from student_trainer.launching.processes import free_port, killed_with_parent, start_logged

logger = logging.getLogger(__name__)

# The variables that torchrun sets, from those that srun sets.
_AS_RANK = (
    "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS; "
    'export LOCAL_WORLD_SIZE=$((SLURM_STEP_NUM_TASKS / SLURM_STEP_NUM_NODES)); exec "$@"'
)


class SlurmHosts(Hosts):
    """The nodes of the allocation that this process runs in, of all components if the job is heterogeneous.

    Raises:
        ConfigError: this process does not run in an allocation.
    """

    def __init__(self) -> None:
        if "SLURM_JOB_ID" not in os.environ:
            raise ConfigError("this is not a SLURM job: submit the script with sbatch, or add --local to run it here")
        self.job = os.environ["SLURM_JOB_ID"]
        self.components = int(os.environ.get("SLURM_HET_SIZE", "0"))
        restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        suffix = f".{restarts}" if restarts != "0" else ""
        self.job_name = f"{os.environ.get('SLURM_JOB_NAME', 'job')}-{self.job}{suffix}"
        self.bind = "0.0.0.0"  # noqa: S104 - ranks on other nodes connect to the servers
        self.shared = True
        self.nodes = tuple(node for component in range(self.components or 1) for node in self._nodes(component))

    def component(self, number: int) -> tuple[Node, ...]:
        """The nodes of one component.

        Raises:
            ConfigError: the job has no such component.
        """
        nodes = tuple(node for node in self.nodes if node.component == number)
        if not nodes:
            raise ConfigError(f"job {self.job} has no component {number}: add one with #SBATCH hetjob")
        return nodes

    def variable(self, name: str, component: int, default: str = "") -> str:
        """One of SLURM's variables for a component."""
        own = os.environ.get(f"{name}_HET_GROUP_{component}") if self.components else None
        return own or os.environ.get(name, default)

    def start(
        self, step: str, command: Sequence[str], node: Node, log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """See `Hosts.start`."""
        return start_logged(killed_with_parent([*self._srun(step, [node], 1), *command]), log, environment)

    def start_ranks(self, command: Sequence[str], placement: Placement) -> list[subprocess.Popen[str]]:
        """See `Hosts.start_ranks`. srun starts all ranks, so one process is returned."""
        srun = self._srun(TRAINER, placement.trainers, placement.ranks_per_node)
        ranks = ["bash", "-c", _AS_RANK, "rank", *visible_gpus(placement), *command]
        master = {"MASTER_ADDR": placement.trainers[0].address, "MASTER_PORT": free_port()}
        return [start_rank(killed_with_parent([*srun, *ranks]), master)]

    def send_signal(self, step: str, processes: Sequence[subprocess.Popen[str]], number: signal.Signals) -> None:
        """See `Hosts.send_signal`. A signal to srun itself would end its tasks at once.

        Raises:
            ConfigError: SLURM does not list the job's steps.
        """
        del processes
        jobs = [self.job, *(self.variable("SLURM_JOB_ID", number) for number in range(1, self.components))]
        listed = _output(["squeue", "--steps", "--noheader", "--jobs", ",".join(jobs), "--format", "%i %j"])
        for line in listed.splitlines():
            identifier, _, name = line.partition(" ")
            if name.strip() == step:
                # The step may have ended by itself. SLURM 22.05 also reports an error for a signal that it delivered.
                command = ["scancel", f"--signal={number.name[3:]}", identifier]
                subprocess.run(command, check=False, capture_output=True)

    def requeue(self) -> None:
        """See `Hosts.requeue`.

        Raises:
            ConfigError: SLURM refuses.
        """
        logger.info("asking SLURM to requeue job %s", self.job)
        command = ["scontrol", "requeue", self.job]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        # A negative code means that a signal ended scontrol: SLURM is ending the whole job already.
        if done.returncode > 0:
            raise ConfigError(
                f"SLURM does not requeue job {self.job} ({done.stderr.strip()}); submit it again to continue from the "
                "checkpoint"
            )

    def _nodes(self, component: int) -> list[Node]:
        names = _output(["scontrol", "show", "hostnames", self.variable("SLURM_JOB_NODELIST", component)]).split()
        return [Node(name, _address(name), component) for name in names]

    def _srun(self, step: str, nodes: Sequence[Node], tasks_per_node: int) -> list[str]:
        component = nodes[0].component
        # For example 32(x2),64: two nodes with 32 CPUs each and one with 64.
        cpus = re.findall(r"(\d+)(?:\(x\d+\))?", self.variable("SLURM_JOB_CPUS_PER_NODE", component, "1"))
        return [
            "srun",
            # Under sbatch --export=A=... srun would pass on no other variable.
            "--export=ALL",
            f"--job-name={step}",
            *([f"--het-group={component}"] if self.components else []),
            "--overlap",
            "--mem=0",
            f"--nodes={len(nodes)}",
            f"--ntasks={len(nodes) * tasks_per_node}",
            f"--ntasks-per-node={tasks_per_node}",
            f"--cpus-per-task={max(1, min(map(int, cpus)) // tasks_per_node)}",
            f"--nodelist={','.join(node.name for node in nodes)}",
            "--kill-on-bad-exit=1",
            "--unbuffered",
        ]


def _address(node: str) -> str:
    """The address of a node; the resolver need not know its name."""
    found = re.search(r"\bNodeAddr=(\S+)", _output(["scontrol", "show", "node", node]))
    return found.group(1) if found else node


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        problem = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise ConfigError(f"`{' '.join(command)}` failed: {problem}") from error

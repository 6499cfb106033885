"""A real SLURM cluster on this machine for tests: several nodes with simulated GPUs. Needs root."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil

from tests.support.servers import REPOSITORY, wait_until

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
PACKAGES = "slurmctld slurmd slurm-client munge"
GPUS, CPUS = 8, 32
START_SECONDS = 60.0
OVER = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED"}
)

CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=60
KillWait=30
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class SlurmCluster:
    """Nodes n1 to nN of one partition.

    Args:
        directory: for state and logs; its path must not contain blanks.
        nodes: the number of nodes.
        task_environment: variables that TaskProlog sets in every task, including the job script.
    """

    def __init__(self, directory: Path, nodes: int, task_environment: Mapping[str, str] | None = None) -> None:
        self.directory, self.count = directory, nodes
        self._task_environment = task_environment or {}
        self.environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        lacking = [program for program in NEEDED if shutil.which(program, path=_path()) is None]
        if lacking or os.geteuid() != 0:
            raise RuntimeError(
                f"needs root and SLURM; lacking: {', '.join(lacking) or 'root'} (Debian: apt-get install {PACKAGES})"
            )
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if len(self._daemons) > 1:
            subprocess.run(["scancel", "--full", "--user=root"], env=self.environment, check=False)
        processes = [process for daemon in self._daemons for process in _tree(daemon.pid)]
        for daemon in self._daemons:
            daemon.terminate()
        for left in psutil.wait_procs(processes, timeout=20)[1]:
            left.kill()
        for daemon in self._daemons:
            daemon.wait()

    def submit(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
        """Run `sbatch` with these arguments in the repository root, and return the job number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *command],
            cwd=REPOSITORY,
            env={**self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def call(self, *command: str) -> str:
        """Run a SLURM command and return its output."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def shown(self, job: int) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        fields = (field.partition("=") for field in self.call("scontrol", "show", "job", str(job)).split())
        return {name: value for name, _, value in fields}

    def wait(self, job: int, seconds: float) -> dict[str, str]:
        """Wait until the job has ended, and return its fields."""
        until = time.monotonic() + seconds
        while (shown := self.shown(job))["JobState"] not in OVER:
            assert time.monotonic() < until, shown
            time.sleep(0.5)
        return shown

    def wait_while_running(
        self, job: int, condition: Callable[[], bool], seconds: float, output: Callable[[], str]
    ) -> None:
        """Wait until the job meets a condition. Fail with its output if it ends first, or after these seconds."""
        until = time.monotonic() + seconds
        while not condition():
            shown = self.shown(job)
            # A job that ended may have met the condition since it was asked.
            late = shown["JobState"] in OVER or time.monotonic() > until
            assert condition() or not late, (shown, output())
            time.sleep(0.05)

    def _start(self) -> None:
        directory, host = self.directory, socket.gethostname().partition(".")[0]
        (directory / "state").mkdir(parents=True)
        port, *ports = _free_ports(self.count + 1)
        nodes = "\n".join(
            f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={listens} CPUs={CPUS} RealMemory=600000 "
            f"Gres=gpu:{GPUS} State=UNKNOWN"
            for number, listens in enumerate(ports, start=1)
        )
        text = CONFIGURATION.format(directory=directory, host=host, port=port, nodes=nodes) + self._task_prolog()
        (directory / "slurm.conf").write_text(text, encoding="utf-8")
        for number in range(GPUS):
            # SLURM requires a device per GPU; these are /dev/null.
            os.mknod(directory / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        gpus = f"AutoDetect=off\nName=gpu File={directory}/gpu[0-{GPUS - 1}]\n"
        (directory / "gres.conf").write_text(gpus, encoding="utf-8")
        key = directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(64))
        names = ("key-file", "socket", "pid-file", "seed-file", "log-file")
        munged = [f"--{name}={directory}/munge.{name.removesuffix('-file')}" for name in names]
        self._daemon("munged", "--foreground", "--force", *munged)
        wait_until((directory / "munge.socket").exists, START_SECONDS)
        self._daemon("slurmctld", "-D", "-c")
        for number in range(1, self.count + 1):
            (directory / "spool" / f"n{number}").mkdir(parents=True)
            self._daemon("slurmd", "-D", "-N", f"n{number}")
        wait_until(self._all_idle, START_SECONDS)

    def _task_prolog(self) -> str:
        """Write the program that sets the tasks' variables, and return its line of the configuration."""
        if not self._task_environment:
            return ""
        lines = [f"echo {shlex.quote(f'export {name}={value}')}" for name, value in self._task_environment.items()]
        program = self.directory / "task_prolog.sh"
        program.write_text("\n".join(["#!/bin/sh", *lines, ""]), encoding="utf-8")
        program.chmod(0o755)
        return f"TaskProlog={program}\n"

    def _daemon(self, program: str, *arguments: str) -> None:
        found = shutil.which(program, path=_path())
        assert found is not None
        with (self.directory / f"{program}{len(self._daemons)}.out").open("wb") as out:
            self._daemons.append(
                subprocess.Popen(
                    [found, *arguments], env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
                )
            )

    def _all_idle(self) -> bool:
        for daemon in self._daemons:
            assert daemon.poll() is None, (daemon.args, (self.directory / "slurmctld.log"))
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        done = subprocess.run(idle, env=self.environment, capture_output=True, check=False)
        return done.stdout.strip() == str(self.count).encode()


def _path() -> str:
    """PATH with the directories of daemons, which a user's PATH may lack."""
    return os.environ["PATH"] + ":/usr/local/sbin:/usr/sbin:/sbin"


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    try:
        for listener in held:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in held]
    finally:
        for listener in held:
            listener.close()

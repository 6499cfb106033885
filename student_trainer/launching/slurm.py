"""The commands of the templates in deploy/slurm: `python -m student_trainer.launching.slurm COMMAND ... -- FLAGS`.

FLAGS go to `kvdistill serve` (teacher, teacher_two_nodes) or to the recipe (student, hetjob). LOG_DIR in the
environment is the folder of the jobs' logs, `logs` by default. Does not import torch.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from kvcore.errors import ConfigError
from kvcore.files import replace_file
from student_trainer.launching.credentials import create_token
from student_trainer.launching.endpoints import read_endpoints, teacher_names, write_endpoints
from student_trainer.launching.job import Job, JobError, StoppedError, exit_status
from student_trainer.launching.placement import Node, Placement
from student_trainer.launching.processes import end, tail
from student_trainer.launching.slurm_hosts import SlurmHosts
from student_trainer.launching.transport_variables import TLS_CA, TOKEN_FILE

# In the folder of endpoints: the folder of the servers' certificates, and in it the file of their token.
ACCESS, TOKEN = "access", "token"

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Entry point; the exit status tells SLURM how the job ended."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="slurm", description=__doc__)
    published = argparse.ArgumentParser(add_help=False)
    published.add_argument("--endpoints", type=Path, required=True, help="folder where teachers publish endpoints")
    served = argparse.ArgumentParser(add_help=False)
    served.add_argument("--model", required=True, help="directory or hub id")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("teacher", parents=[served, published], help="serve a model on one node")
    commands.add_parser("teacher_two_nodes", parents=[served, published], help="serve a model from two nodes")
    student = commands.add_parser("student", parents=[published], help="train with teachers of other jobs")
    student.add_argument("--teachers", required=True, help="names, separated by spaces")
    hetjob = commands.add_parser("hetjob", help="serve on components 1, 2, ... and train on component 0")
    hetjob.add_argument("--serve", action="append", required=True, help="model and its flags, for the next component")
    given, flags = parser.parse_args(arguments[:cut]), arguments[cut + 1 :]

    def run() -> None:
        hosts = SlurmHosts()
        job = SlurmJob(hosts, Job(hosts, Path(os.environ.get("LOG_DIR") or "logs")), flags)
        if given.command == "teacher":
            job.teacher(given.model, given.endpoints)
        elif given.command == "teacher_two_nodes":
            job.teacher_two_nodes(given.model, given.endpoints)
        elif given.command == "student":
            job.student(given.teachers.split(), given.endpoints)
        else:
            job.hetjob([shlex.split(one) for one in given.serve])

    return exit_status("slurm", run)


class SlurmJob:
    """One job of the templates.

    Args:
        hosts: the allocation.
        job: its processes.
        flags: of `kvdistill serve` or of the recipe.
    """

    def __init__(self, hosts: SlurmHosts, job: Job, flags: Sequence[str]) -> None:
        self._hosts, self._job, self._flags = hosts, job, flags

    def teacher(self, model: str, folder: Path) -> None:
        """Serves a model on the first node and publishes its endpoint in a folder, until a signal arrives."""
        with self._job.running():
            self._serve(model, folder, [])

    def teacher_two_nodes(self, model: str, folder: Path) -> None:
        """Serves a model with vLLM's workers on two nodes, which vLLM reaches through Ray; otherwise as `teacher`."""
        gpus = os.environ.get("SLURM_GPUS_ON_NODE")
        if not gpus or len(self._hosts.nodes) != 2:
            raise ConfigError("teacher_two_nodes needs two nodes with GPUs: sbatch --nodes=2 --gpus-per-node=N")
        head, port = self._hosts.nodes[0].address, 20000 + int(self._hosts.job) % 10000
        # vLLM reads it.
        os.environ["RAY_ADDRESS"] = f"{head}:{port}"
        flags = ["--engine", "vllm", "--max-model-len", "8192", "--tensor-parallel-size", gpus]
        flags += ["--pipeline-parallel-size", "2", "--worker-address", f"{head}:{port + 1}"]
        flags += ["--vllm-args", '{"distributed_executor_backend": "ray"}']
        ray: list[subprocess.Popen[str]] = []
        try:
            with self._job.running():
                self._start_ray(ray, port, gpus)
                self._serve(model, folder, flags)
        finally:
            end(*ray)

    def student(self, teachers: Sequence[str], folder: Path) -> None:
        """Trains with the teachers that other jobs have published in a folder."""
        with self._job.running():
            for name in teachers:
                self._job.wait_until(
                    lambda name=name: any(folder.glob(f"{name}.*")),
                    f"no server of {name} is ready: {folder} has no {name}.*",
                )
            published = [path for name in teachers for path in sorted(folder.glob(f"{name}.*"))]
            self._use_access(folder / ACCESS, [path.name for path in published])
            self._train(read_endpoints([f"@{path}" for path in published], teachers))

    def hetjob(self, served: Sequence[Sequence[str]]) -> None:
        """Serves models on components 1, 2, ..., each given with its flags, and trains on component 0."""
        with self._job.running():
            self._job.protect_servers([flag for one in served for flag in one])
            for component, (model, *flags) in enumerate(served, start=1):
                (name,) = teacher_names([model])
                self._job.servers.start(name, self._hosts.component(component)[0], ["--model", model, *flags])
            self._train(self._job.wait_ready())

    def _serve(self, model: str, folder: Path, flags: Sequence[str]) -> None:
        (name,) = teacher_names([model])
        published = folder / f"{name}.{self._hosts.job}"
        certificate = folder / ACCESS / published.name
        create_token(folder / ACCESS / TOKEN)
        made = self._job.protect_servers([*flags, *self._flags], folder / ACCESS / TOKEN)
        self._job.servers.start(name, self._hosts.nodes[0], ["--model", model, *flags, *self._flags])
        endpoints = self._job.wait_ready()
        if made:
            replace_file(certificate, made.certificate.read_text(encoding="ascii"))
        write_endpoints(published, endpoints)
        logger.info("ready: %s", published.read_text(encoding="utf-8").strip())
        try:
            # The job of a teacher normally ends by a signal.
            with suppress(StoppedError):
                self._job.watch_servers()
        finally:
            published.unlink(missing_ok=True)
            certificate.unlink(missing_ok=True)

    def _use_access(self, access: Path, published: Sequence[str]) -> None:
        """Lets the ranks trust the certificates of published servers, if they have any, and send the folder's token."""
        certificates = [access / name for name in published if (access / name).is_file()]
        if not certificates:
            return  # the servers were started with files of the user, or without any
        if len(certificates) != len(published):
            plain = next(name for name in published if not (access / name).is_file())
            raise ConfigError(
                f"{access} has a certificate of {certificates[0].name}, but none of {plain}: start all teachers with "
                "the same flags for TLS"
            )
        trusted = self._job.log_dir / "trusted.crt"
        replace_file(trusted, "".join(path.read_text(encoding="ascii") for path in certificates))
        os.environ.update({TLS_CA: str(trusted.absolute()), TOKEN_FILE: str((access / TOKEN).absolute())})

    def _train(self, endpoints: Mapping[str, Sequence[str]]) -> None:
        ranks = int(self._hosts.variable("SLURM_NTASKS_PER_NODE", 0, "1"))
        command = [sys.executable, "-m", "experiments.train_multi_teacher_kv"]
        command += ["--teacher_endpoints", f"@{self._job.endpoints_file}", *self._flags]
        self._job.train(command, Placement(self._hosts.component(0), ranks), endpoints)

    def _start_ray(self, started: list[subprocess.Popen[str]], port: int, gpus: str) -> None:
        """Starts Ray on both nodes and adds its processes to `started`. vLLM waits for the second node."""
        ray = Path(sys.executable).with_name("ray")
        if not ray.is_file():
            raise ConfigError(f"{ray} is missing: install ray and vllm where {sys.executable} is")
        head, second = self._hosts.nodes
        address = f"{head.address}:{port}"
        status = [str(ray), "status", f"--address={address}"]

        def start(node: Node, *role: str) -> None:
            command = [str(ray), "start", "--block", "--disable-usage-stats", *role]
            command += [f"--node-ip-address={node.address}", f"--num-gpus={gpus}"]
            started.append(self._hosts.start("ray", command, node, self._job.log_dir / f"ray_{len(started)}.log"))

        def answers() -> bool:
            if (code := started[0].poll()) is not None:
                log = self._job.log_dir / "ray_0.log"
                raise JobError(f"Ray on {head.name} ended with code {code}; the end of {log}:\n{tail(log)}")
            return subprocess.run(status, check=False, capture_output=True).returncode == 0

        start(head, "--head", f"--port={port}")
        self._job.wait_until(answers, f"Ray is not up on {head.name}")
        start(second, f"--address={address}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

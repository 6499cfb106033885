"""Tests of the templates of deploy/slurm on a real SLURM, with tiny models and one partition."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.servers import REPOSITORY, wait_until
from tests.support.slurm_cluster import SlurmCluster
from tests.support.training import LATENTS, World, make_world, metrics

STEPS = 3
JOB_SECONDS = 400.0
TEMPLATES = "deploy/slurm"
# The cluster's nodes are smaller than the templates expect.
SMALLER = {"partition": "gpu", "ntasks-per-node": 1, "cpus-per-task": 4}
STAND_IN_RAY = """#!/usr/bin/env bash
echo "$@"
if [[ $1 == start ]]; then touch "$(dirname "$0")/up"; exec sleep 1000; fi
exec test -e "$(dirname "$0")/up"
"""
STAND_IN_SERVER = """import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit('{"event": "drained"}'))
print('{"event": "ready", "grpc_port": 4321}', sys.argv[1:], os.environ["RAY_ADDRESS"], sep="\\n", flush=True)
signal.pause()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster", 4) as running:
        yield running


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def environment(tmp_path: Path) -> dict[str, str]:
    return {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "LOG_DIR": str(tmp_path / "logs"),
        "ENDPOINTS": str(tmp_path / "endpoints"),
    }


def recipe_flags(world: World, tmp_path: Path, *teachers: str) -> list[str]:
    models = " ".join(str(world.teachers[name]) for name in teachers)
    return (
        f"--student_model_name_or_path {world.student} --teacher_models {models} --output_dir {tmp_path / 'out'} "
        f"--max_steps {STEPS} --num_latents {LATENTS} --latent_passes 1 --calibration_samples 48 --logging_steps 1 "
        "--answer_tokens 2 --val_samples 8 --bf16 false --gradient_accumulation_steps 1"
    ).split()


def smaller(*options: str) -> list[str]:
    return [*(f"--{option}={value}" for option, value in SMALLER.items()), *options]


def output(tmp_path: Path, job: int) -> str:
    return (tmp_path / f"{job}.out").read_text(encoding="utf-8", errors="replace")


def end_teacher(cluster: SlurmCluster, tmp_path: Path, job: int) -> None:
    """Send the signal that SLURM sends shortly before the time limit."""
    cluster.call("scancel", "--batch", "--signal=TERM", str(job))
    assert cluster.wait(job, JOB_SECONDS)["JobState"] == "COMPLETED", output(tmp_path, job)


def test_hetjob_trains_with_teachers_on_two_components(cluster: SlurmCluster, world: World, tmp_path: Path) -> None:
    text = (REPOSITORY / TEMPLATES / "hetjob.sbatch").read_text(encoding="utf-8")
    for option, value in SMALLER.items():
        text = re.sub(rf"--{option}=\w+", f"--{option}={value}", text)
    script = tmp_path / "hetjob.sbatch"
    script.write_text(text, encoding="utf-8")
    variables = environment(tmp_path) | {
        "DATASET": str(world.directory),
        "SMALL": str(world.teachers["ada"]),
        "SMALL_FLAGS": "--device cpu",
        "LARGE": str(world.teachers["ben"]),
        "LARGE_FLAGS": "--device cpu --threads 1",
    }
    flags = recipe_flags(world, tmp_path, "ada", "ben")
    job = cluster.submit([f"--output={tmp_path}/%j.out", str(script), *flags], variables)
    shown = cluster.wait(job, JOB_SECONDS)
    assert shown["JobState"] == "COMPLETED", output(tmp_path, job)
    assert re.search(r"serving ada on n3;[^\n]*\n.*serving ben on n4;", output(tmp_path, job))
    assert "the servers use TLS and a token: " in output(tmp_path, job)
    assert metrics(tmp_path / "out", "train/loss").keys() == set(range(1, STEPS + 1))
    assert metrics(tmp_path / "out", "routing/weights_mean/ben").keys() == set(range(1, STEPS + 1))
    for name in world.teachers:
        log = tmp_path / "logs" / f"kvdistill-hetjob-{job}" / f"serve_{name}.log"
        assert '"drained"' in log.read_text(encoding="utf-8")


def test_student_trains_with_replicas_that_other_jobs_published(
    cluster: SlurmCluster, world: World, tmp_path: Path
) -> None:
    variables = environment(tmp_path) | {"MODEL": str(world.teachers["ada"]), "TEACHERS": "ada"}
    options = smaller(f"--output={tmp_path}/%j.out")
    serve = [*options, f"{TEMPLATES}/teacher.sbatch", "--device", "cpu", "--threads", "1"]
    teachers = [cluster.submit(serve, variables) for _ in range(2)]
    published = [tmp_path / "endpoints" / f"ada.{job}" for job in teachers]
    wait_until(lambda: all(path.exists() for path in published), JOB_SECONDS)
    flags = recipe_flags(world, tmp_path, "ada")
    train = [*options, "--nodes=1", f"{TEMPLATES}/student.sbatch", *flags]
    student = cluster.submit(train, variables | {"DATASET": str(world.directory)})
    assert cluster.wait(student, JOB_SECONDS)["JobState"] == "COMPLETED", output(tmp_path, student)
    assert re.search(r"teachers: ada=[\d.]+:\d+,[\d.]+:\d+\n", output(tmp_path, student))
    assert metrics(tmp_path / "out", "train/loss").keys() == set(range(1, STEPS + 1))
    access = tmp_path / "endpoints" / "access"
    assert sorted(path.name for path in access.iterdir()) == sorted(["token", *(path.name for path in published)])
    for job, path in zip(teachers, published, strict=True):
        assert "the servers use TLS and a token: " in output(tmp_path, job)
        end_teacher(cluster, tmp_path, job)
        assert not path.exists()
        assert not (access / path.name).exists()
        log = tmp_path / "logs" / f"kvdistill-teacher-{job}" / "serve_ada.log"
        assert '"drained"' in log.read_text(encoding="utf-8")


def test_student_fails_if_no_server_is_ready_in_time(cluster: SlurmCluster, tmp_path: Path) -> None:
    variables = environment(tmp_path) | {"TEACHERS": "ada", "READY_SECONDS": "0"}
    job = cluster.submit(
        [*smaller(f"--output={tmp_path}/%j.out", "--nodes=1"), f"{TEMPLATES}/student.sbatch"], variables
    )
    assert cluster.wait(job, JOB_SECONDS)["JobState"] == "FAILED"
    assert f"no server of ada is ready: {tmp_path}/endpoints has no ada.* after 0 s" in output(tmp_path, job)


def test_two_node_teacher_starts_ray_on_both_nodes_and_its_server_on_the_first(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    """Stand-ins replace Ray and `kvdistill serve`: this tests the steps and signals only."""
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    ray = python.with_name("ray")
    ray.write_text(STAND_IN_RAY, encoding="utf-8")
    ray.chmod(0o755)
    server = tmp_path / "stand_in" / "kvdistill"
    server.mkdir(parents=True)
    (server / "__init__.py").touch()
    (server / "__main__.py").write_text(STAND_IN_SERVER, encoding="utf-8")
    search = [str(server.parent), str(REPOSITORY), sysconfig.get_path("purelib")]
    variables = environment(tmp_path) | {
        "PYTHON": str(python),
        "PYTHONPATH": ":".join(search),
        # Otherwise the package of the checkout would be imported.
        "PYTHONSAFEPATH": "1",
        "MODEL": "models/large",
    }
    script = f"{TEMPLATES}/teacher_two_nodes.sbatch"
    job = cluster.submit([*smaller(f"--output={tmp_path}/%j.out"), script, "--dtype", "bf16"], variables)
    published = tmp_path / "endpoints" / f"large.{job}"
    wait_until(published.exists, JOB_SECONDS)
    assert published.read_text(encoding="utf-8") == "large=127.0.0.1:4321\n"
    logs = tmp_path / "logs" / f"kvdistill-teacher-{job}"
    port = 20000 + job
    ray_flags = "--block --disable-usage-stats {} --node-ip-address=127.0.0.1 --num-gpus=8"
    assert (logs / "ray_0.log").read_text() == f"start {ray_flags.format(f'--head --port={port}')}\n"
    worker = logs / "ray_1.log"
    # The server does not wait for the second node here.
    wait_until(lambda: worker.is_file() and worker.read_text().endswith("\n"))
    assert worker.read_text() == f"start {ray_flags.format(f'--address=127.0.0.1:{port}')}\n"
    served = (logs / "serve_large.log").read_text(encoding="utf-8")
    for argument in (
        f"'--worker-address', '127.0.0.1:{port + 1}'",
        "'--tensor-parallel-size', '8'",
        "'--dtype', 'bf16'",
    ):
        assert argument in served
    assert f"\n127.0.0.1:{port}\n" in served
    end_teacher(cluster, tmp_path, job)
    assert not published.exists()
    assert '"drained"' in (logs / "serve_large.log").read_text(encoding="utf-8")

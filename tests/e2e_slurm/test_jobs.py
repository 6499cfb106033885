"""Tests of the two job scripts on a real SLURM: servers and ranks on separate nodes, failures, and resuming."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.servers import wait_until
from tests.support.slurm_cluster import SlurmCluster
from tests.support.tiny_models import save_tiny_model, tiny_spec
from tests.support.training import LATENTS, World, make_world, metrics

NODES = 4
THREE_STAGES = "scripts/run_three_stage_routing.sh"
LARGE_SCALE = "scripts/run_large_scale_multi_teacher.sh"
JOB_SECONDS = 400.0
TINY = (
    f"--num_latents {LATENTS} --latent_passes 1 --calibration_samples 48 --logging_steps 1 --answer_tokens 2 "
    "--val_samples 8"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster", NODES) as running:
        yield running


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"))
    spec = tiny_spec("mistral", layers=2, kv_heads=2, head_dim=12, seed=5)
    return World(
        made.directory,
        made.student,
        {**made.teachers, "cai": save_tiny_model(made.directory / "cai", spec)},
        made.train,
        made.val,
    )


def exported(world: World, tmp_path: Path, steps: int, **variables: object) -> str:
    """The flag `--export` as in the guide. The job gets no other variables."""
    given = {
        "STUDENT": world.student,
        "DATASET": world.directory,
        "OUTPUT_DIR": tmp_path / "out",
        "LOG_DIR": tmp_path / "logs",
        "PYTHON": sys.executable,
        "DEVICE": "cpu",
        "HF_HUB_OFFLINE": 1,
        "OMP_NUM_THREADS": 1,
        "USE_BF16": "false",
        "GRAD_ACCUM": 1,
        "LEARNING_RATE": 1e-3,
        "EXTRA_ARGS": f"{TINY} --max_steps {steps}",
        **variables,
    }
    return "--export=" + ",".join(f"{name}={value}" for name, value in given.items())


def printed(tmp_path: Path) -> str:
    (log,) = tmp_path.glob("*.out")
    return log.read_text(encoding="utf-8", errors="replace")


def submit(cluster: SlurmCluster, tmp_path: Path, script: str, *options: str) -> int:
    return cluster.submit([f"--output={tmp_path}/%j.out", *options, script])


def test_ranks_train_with_three_teachers_on_three_other_nodes(
    cluster: SlurmCluster, world: World, tmp_path: Path
) -> None:
    models = " ".join(map(str, world.teachers.values()))
    weights = {"FIXED_WEIGHTS": "0.5 0.3 0.2", "TEACHER_MODELS": models, "NUM_TEACHERS": 3, "RANKS_PER_NODE": 2}
    job = submit(cluster, tmp_path, LARGE_SCALE, exported(world, tmp_path, 3, **weights))
    shown = cluster.wait(job, JOB_SECONDS)
    assert shown["JobState"] == "COMPLETED", printed(tmp_path)
    assert f"job large_scale_multi_teacher-{job}: 2 ranks on each of n1\n" in printed(tmp_path)
    for node, name in zip(("n2", "n3", "n4"), world.teachers, strict=True):
        assert f"teacher {name} on {node} (cpu)\n" in printed(tmp_path)
    logs = tmp_path / "logs" / f"large_scale_multi_teacher-{job}"
    assert [line.partition("=")[0] for line in (logs / "endpoints.txt").read_text().splitlines()] == [*world.teachers]
    # Servers that use TLS and a token were reached, so the ranks had the job's certificate and token.
    assert f"the servers use TLS and a token: {logs}/access\n" in printed(tmp_path)
    for name, weight in zip(world.teachers, (0.5, 0.3, 0.2), strict=True):
        # The job stopped its server with SIGTERM.
        assert '"drained"' in (logs / f"serve_{name}.log").read_text(encoding="utf-8")
        assert metrics(tmp_path / "out", f"routing/weights_mean/{name}")[3] == pytest.approx(weight)
    assert (tmp_path / "out" / "best_model" / "latent.safetensors").is_file()


def test_three_stages_run_in_order(cluster: SlurmCluster, world: World, tmp_path: Path) -> None:
    teachers = f"{world.teachers['ada']} {world.teachers['ben']}"
    options = ("--job-name=qwen_dual", exported(world, tmp_path, 2, TEACHERS=teachers, FUSION_STRATEGY=""))
    job = submit(cluster, tmp_path, THREE_STAGES, *options)
    assert cluster.wait(job, JOB_SECONDS)["JobState"] == "COMPLETED", printed(tmp_path)
    assert f"job qwen_dual-{job}: 8 ranks" not in printed(tmp_path)
    for stage in ("stage1_fixed", "stage2_similarity", "stage3_learnable"):
        results = json.loads((tmp_path / "out" / stage / "eval_results.json").read_text(encoding="utf-8"))
        assert results.keys() == {"val", "average"}
    assert metrics(tmp_path / "out" / "stage3_learnable", "routing/router_loss").keys() == {1, 2}


@pytest.mark.parametrize(
    ("variables", "status", "problem"),
    [
        ({"TEACHERS": "no/such-model"}, "1:0", "teacher 'such-model': its server on n2 ended with code 2"),
        ({"STUDENT": "no/such-student"}, "1:0", "student.path: cannot load 'no/such-student'"),
        # An error that only the ranks detect.
        ({"HEAD_ADAPT_STRATEGY": "identity"}, "1:0", "training failed with code 2"),
        ({"KV_COMPRESSION": "left"}, "2:0", "--kv_compression: expected one of full, right, r_kv"),
    ],
)
def test_failed_job_has_a_failed_state_and_a_message(
    cluster: SlurmCluster, world: World, tmp_path: Path, variables: dict[str, str], status: str, problem: str
) -> None:
    given = {"TEACHERS": world.teachers["ada"], **variables}
    job = submit(cluster, tmp_path, THREE_STAGES, "--nodes=2", exported(world, tmp_path, 2, **given))
    shown = cluster.wait(job, JOB_SECONDS)
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", status), printed(tmp_path)
    assert problem in printed(tmp_path)
    assert "done: " not in printed(tmp_path)


def test_requeued_job_resumes_at_the_saved_step(cluster: SlurmCluster, world: World, tmp_path: Path) -> None:
    steps = 150
    given = {"TEACHER_MODELS": world.teachers["ada"], "FIXED_WEIGHTS": "", "NUM_TEACHERS": ""}
    job = submit(cluster, tmp_path, LARGE_SCALE, "--nodes=2", exported(world, tmp_path, steps, **given))

    def reaches(step: int) -> None:
        path = tmp_path / "out" / "metrics.jsonl"
        cluster.wait_while_running(
            job,
            lambda: path.is_file() and max(metrics(tmp_path / "out", "train/loss"), default=0) >= step,
            JOB_SECONDS,
            lambda: printed(tmp_path),
        )

    def run_again(restarts: int) -> int:
        """Wait until the job is requeued, let it start soon, and return the step of its checkpoint."""
        wait_until(lambda: cluster.shown(job)["Restarts"] == str(restarts), JOB_SECONDS)
        wait_until(lambda: cluster.shown(job)["JobState"] == "PENDING", JOB_SECONDS)
        saved = max(int(path.name.rpartition("-")[2]) for path in (tmp_path / "out" / "checkpoints").glob("step-*"))
        # Within a second of its end, SLURM takes the new start for the old job and fails it ("credential revoked").
        cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now+5")
        return saved

    reaches(3)
    # SLURM sends this signal to the script shortly before the time limit.
    cluster.call("scancel", "--batch", "--signal=USR1", str(job))
    first = run_again(1)
    assert f"asking SLURM to requeue job {job}" in printed(tmp_path)
    reaches(first + 3)
    # SLURM preempts a job with SIGTERM to every process.
    cluster.call("scontrol", "requeue", str(job))
    second = run_again(2)
    assert 3 <= first < second < steps
    assert cluster.wait(job, JOB_SECONDS)["JobState"] == "COMPLETED", printed(tmp_path)
    for step in (first, second):
        assert f"resuming from {tmp_path}/out/checkpoints/step-{step:08d}" in printed(tmp_path)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [line["step"] for line in map(json.loads, lines) if "train/loss" in line]
    assert logged == list(range(1, steps + 1))

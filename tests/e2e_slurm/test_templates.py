"""A template of deploy/slurm on a real SLURM, with tiny models and this cluster's one partition in place of three."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.support.servers import REPOSITORY
from tests.support.slurm_cluster import SlurmCluster
from tests.support.training import LATENTS, make_world, metrics

STEPS = 3
JOB_SECONDS = 400.0
# What the template asks of a cluster, as this one has it.
SMALLER = {"partition": "gpu", "ntasks-per-node": 1, "cpus-per-task": 4}


def test_a_job_of_three_components_trains_from_teachers_on_two_of_them(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    text = (REPOSITORY / "deploy" / "slurm" / "hetjob.sbatch").read_text(encoding="utf-8")
    for option, value in SMALLER.items():
        text = re.sub(rf"--{option}=\w+", f"--{option}={value}", text)
    script = tmp_path / "hetjob.sbatch"
    script.write_text(text, encoding="utf-8")
    environment = {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "DATASET": str(world.directory),
        "LOG_DIR": str(tmp_path / "logs"),
        "SMALL": str(world.teachers["ada"]),
        "SMALL_FLAGS": "--device cpu",
        "LARGE": str(world.teachers["ben"]),
        "LARGE_FLAGS": "--device cpu --threads 1",
    }
    flags = (
        f"--student_model_name_or_path {world.student} --teacher_models {world.teachers['ada']} "
        f"{world.teachers['ben']} --output_dir {tmp_path / 'out'} --max_steps {STEPS} --num_latents {LATENTS} "
        "--latent_passes 1 --calibration_samples 48 --logging_steps 1 --answer_tokens 2 --val_samples 8 --bf16 false "
        "--gradient_accumulation_steps 1"
    )
    with SlurmCluster(tmp_path / "cluster", 4) as cluster:
        job = cluster.submit([f"--output={tmp_path}/job.out", str(script), *flags.split()], environment)
        shown = cluster.wait(job, JOB_SECONDS)
    said = (tmp_path / "job.out").read_text(encoding="utf-8", errors="replace")
    assert shown["JobState"] == "COMPLETED", said
    assert re.search(r"serving ada on n3;[^\n]*\n.*serving ben on n4;", said), said
    assert metrics(tmp_path / "out", "train/loss").keys() == set(range(1, STEPS + 1))
    assert metrics(tmp_path / "out", "routing/weights_mean/ben").keys() == set(range(1, STEPS + 1))
    for name in world.teachers:
        log = tmp_path / "logs" / f"kvdistill-hetjob-{job}" / f"serve_{name}.log"
        assert '"drained"' in log.read_text(encoding="utf-8")

"""Tests of the guide's training command and job script on one machine; they start their own servers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.servers import REPOSITORY
from tests.support.training import LATENTS, World, assert_same_losses, metrics

pytestmark = pytest.mark.slow

TINY = (
    f"--num_latents {LATENTS} --latent_passes 1 --calibration_samples 48 --val_samples 8 --logging_steps 1 "
    "--answer_tokens 2 --learning_rate 1e-3 --max_steps 3"
)


def run(command: list[str], log: Path, **environment: object) -> str:
    variables = {"PYTHONPATH": str(REPOSITORY), **{name: str(value) for name, value in environment.items()}}
    with log.open("wb") as out:
        done = subprocess.run(
            command, cwd=REPOSITORY, env={**os.environ, **variables}, stdout=out, stderr=out, timeout=300, check=False
        )
    output = log.read_text(encoding="utf-8")
    assert done.returncode == 0, output[-6000:]
    return output


def test_job_records_a_store_and_the_training_command_uses_it(world: World, tmp_path: Path) -> None:
    teachers = " ".join(map(str, world.teachers.values()))
    recorded, replayed = tmp_path / "recorded", tmp_path / "replayed"
    output = run(
        ["scripts/run_large_scale_multi_teacher.sh", "--local"],
        tmp_path / "job.log",
        PYTHON=sys.executable,
        STUDENT=world.student,
        TEACHER_MODELS=teachers,
        FIXED_WEIGHTS="0.25,0.75",
        KV_LOSS_WEIGHT="1.0",
        DATASET=world.directory,
        OUTPUT_DIR=recorded,
        LOG_DIR=tmp_path / "logs",
        KV_MODE="record",
        USE_BF16="false",
        GRAD_ACCUM=1,
        RANKS_PER_NODE=2,
        EXTRA_ARGS=TINY,
    )
    assert "2 ranks on each of localhost" in output
    assert f"done: {recorded}" in output
    assert metrics(recorded, "routing/weights_mean/ben")[3] == 0.75
    assert [
        process for process in psutil.process_iter(["cmdline"]) if str(world.teachers["ada"]) in _words(process)
    ] == []

    flags = f"""--student_model {world.student} --teacher_models {teachers} --fixed_weights 0.25,0.75 --bf16 false
        --dataset_name {world.directory} --gradient_accumulation_steps 2 --kv_mode offline --kv_loss_weight 1.0
        --kv_store {recorded}/kv_store --output_dir {replayed}""".split()
    output = run(
        [sys.executable, "experiments/train_multi_teacher_kv.py", *flags, *TINY.split()], tmp_path / "replay.log"
    )
    log = (replayed / "logs" / "train.log").read_text(encoding="utf-8")
    for text in (output, log):
        assert "monitor: http://127.0.0.1:" in text
        last = text.rstrip().splitlines()[-1]
        assert "done: best validation: accuracy " in last
        assert f'next: kvdistill generate {replayed}/best_model "QUESTION"' in last
    assert_same_losses(recorded, replayed, 2e-4)


def _words(process: psutil.Process) -> list[str]:
    return process.info["cmdline"] or []

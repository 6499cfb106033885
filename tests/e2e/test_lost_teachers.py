"""Tests of teachers that are lost, and of runs that are stopped, during training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.servers import REPOSITORY, running_teacher, start_teacher, wait_until
from tests.support.training import World, metrics, start_cli

STEPS = 60


def ran_at_least(output: Path, steps: int, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text(encoding="utf-8")[-4000:]
    return (output / "metrics.jsonl").is_file() and len(metrics(output, "train/loss")) >= steps


def last_step(output: Path) -> int:
    newest = max((output / "checkpoints").glob("step-*"))
    return json.loads((newest / "state.json").read_text(encoding="utf-8"))["step"]


def test_training_survives_the_loss_of_a_replica(world: World, tmp_path: Path) -> None:
    a, b = (start_teacher(world.teachers["ada"], tmp_path / f"{name}.log") for name in "ab")
    try:
        endpoints = [a.wait_ready().endpoint, b.wait_ready().endpoint]
        config = world.config("replica", {"ada": endpoints}, run={"steps": STEPS})
        process, log = start_cli(config, 2, tmp_path)
        output = Path(config["run"]["output_dir"])
        wait_until(lambda: ran_at_least(output, 5, process, log), 120)
        a.kill()
        assert process.wait(300) == 0, log.read_text(encoding="utf-8")[-4000:]
    finally:
        a.stop()
        b.stop()
    assert sorted(metrics(output, "train/loss")) == list(range(1, STEPS + 1))
    assert sum(metrics(output, "kv/missing_samples").values()) == 0
    assert a.endpoint in log.read_text(encoding="utf-8"), "the switch is logged"


def test_losing_the_only_replica_ends_the_run_with_a_checkpoint_and_names_the_teacher(
    world: World, tmp_path: Path
) -> None:
    teacher = start_teacher(world.teachers["ada"], tmp_path / "ada.log")
    try:
        config = world.config("lost", {"ada": [teacher.wait_ready().endpoint]}, run={"steps": 5000})
        process, log = start_cli(config, 2, tmp_path)
        output = Path(config["run"]["output_dir"])
        wait_until(lambda: ran_at_least(output, 5, process, log), 120)
        teacher.kill()
        assert process.wait(120) != 0
    finally:
        teacher.stop()
    log_text = log.read_text(encoding="utf-8")
    assert "teacher 'ada'" in log_text
    assert teacher.endpoint in log_text
    assert last_step(output) >= 5
    assert f"step-{last_step(output):08d}" in log_text


@pytest.mark.slow
def test_a_run_that_may_lose_its_teacher_ends_with_all_steps_and_counts_the_missing_samples(
    world: World, tmp_path: Path
) -> None:
    teacher = start_teacher(world.teachers["ada"], tmp_path / "ada.log")
    try:
        endpoints = {"ada": [teacher.wait_ready().endpoint]}
        kv = {"on_lost": "mask", "lost_steps": STEPS, "patience_s": 1.0}
        config = world.config("masked", endpoints, run={"steps": STEPS}, kv=kv)
        process, log = start_cli(config, 2, tmp_path)
        output = Path(config["run"]["output_dir"])
        wait_until(lambda: ran_at_least(output, 5, process, log), 120)
        teacher.kill()
        assert process.wait(300) == 0, log.read_text(encoding="utf-8")[-4000:]
    finally:
        teacher.stop()
    assert sorted(metrics(output, "train/loss")) == list(range(1, STEPS + 1))
    assert sum(metrics(output, "kv/missing_samples").values()) > 0
    assert "training continues without its K/V" in log.read_text(encoding="utf-8")


@pytest.mark.slow
def test_stopped_ranks_of_a_container_save_a_checkpoint_and_exit_with_0(world: World, tmp_path: Path) -> None:
    with running_teacher(world.teachers["ada"], tmp_path / "ada.log") as teacher:
        config = world.config("container", {"ada": [teacher.endpoint]}, run={"steps": 5000})
        output, log, path = Path(config["run"]["output_dir"]), tmp_path / "run.log", tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [sys.executable, "-m", "student_trainer.launching.ranks", "2", "train", "--config", str(path)]
        with log.open("wb") as out:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=out, stderr=out)
        wait_until(lambda: ran_at_least(output, 3, process, log), 120)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, log.read_text(encoding="utf-8")[-4000:]
    assert last_step(output) >= 3
    assert "Traceback" not in log.read_text(encoding="utf-8")


def test_a_stopped_run_saves_a_checkpoint_and_resumes(world: World, tmp_path: Path) -> None:
    with running_teacher(world.teachers["ada"], tmp_path / "ada.log") as teacher:
        config = world.config("stopped", {"ada": [teacher.endpoint]}, run={"steps": STEPS})
        output = Path(config["run"]["output_dir"])
        process, log = start_cli(config, 2, tmp_path)
        wait_until(lambda: ran_at_least(output, 3, process, log), 120)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) != 0
        stopped_at = last_step(output)
        assert stopped_at < STEPS
        process, log = start_cli(config, 2, tmp_path)
        assert process.wait(300) == 0, log.read_text(encoding="utf-8")[-4000:]
        assert f"step-{stopped_at:08d}" in log.read_text(encoding="utf-8"), "it says where it goes on"
        assert sorted(metrics(output, "train/loss")) == list(range(1, STEPS + 1))
        assert not (output / "checkpoints").exists(), "run.save_every is 0"
        process, log = start_cli(config, 2, tmp_path)
        assert process.wait(120) == 0, log.read_text(encoding="utf-8")[-4000:]
    assert f"all {STEPS} steps are done" in log.read_text(encoding="utf-8")
    assert sorted(metrics(output, "train/loss")) == list(range(1, STEPS + 1))

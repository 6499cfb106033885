"""A trainer that is killed with SIGKILL while it writes checkpoints: the run resumes and equals the calm one."""

from __future__ import annotations

import time
from pathlib import Path
from subprocess import Popen
from typing import Any

import psutil
import pytest

from student_trainer.loop.checkpoint import newest_intact
from tests.support.training import Endpoints, World, assert_same_losses, start_cli, train

pytestmark = pytest.mark.slow

KILLS = 3


def config_of(world: World, name: str, endpoints: Endpoints) -> dict[str, Any]:
    return world.config(name, endpoints, align={"calibration_samples": 16}, run={"steps": 10, "save_every": 1})


def kill_while_saving(process: Popen[bytes], checkpoints: Path, after: int) -> bool:
    """Kill the trainer with all its processes once it writes a checkpoint of a later step; False if it ended first."""
    while process.poll() is None:
        writing = [int(path.name.split("-")[1].split(".")[0]) for path in checkpoints.glob(".step-*.tmp")]
        if any(step > after for step in writing):
            for one in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
                one.kill()
            process.wait()
            return True
        time.sleep(0.0005)
    return False


def test_a_trainer_that_is_killed_while_it_saves_resumes_exactly(
    world: World, endpoints: Endpoints, tmp_path: Path
) -> None:
    (calm,) = train([config_of(world, "calm", endpoints)], 1, tmp_path)
    config = config_of(world, "killed", endpoints)
    checkpoints = Path(config["run"]["output_dir"]) / "checkpoints"
    step, half_written = 0, 0
    for _ in range(KILLS):
        process, log = start_cli(config, 1, tmp_path)
        if not kill_while_saving(process, checkpoints, step):
            assert process.returncode == 0, log.read_text(encoding="utf-8")
            break
        half_written += any(checkpoints.glob(".step-*.tmp"))
        newest = newest_intact(checkpoints)
        step = newest.step if newest is not None else 0
    assert half_written, "no kill hit a checkpoint that was being written"
    (killed,) = train([config], 1, tmp_path)
    assert_same_losses(calm, killed, 0.0)

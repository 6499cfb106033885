"""Tests of a sweep as a SLURM array, with a fast stand-in for the trainer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from tests.support.servers import REPOSITORY
from tests.support.slurm_cluster import SlurmCluster

SWEEP = {
    "output_dir": "out",
    "seeds": [0, 1],
    "flags": {"student_model_name_or_path": "tiny", "teacher_models": ["a", "b"], "max_steps": 3},
    "matrix": {"kv_compression": ["right", "r-kv"]},
    "command": "python -m tests.support.stand_in_trainer",
    "slurm": {"partition": "gpu", "gres": "gpu:8", "time": "5"},
    "max_parallel": 2,
}


def submitted(directory: Path, cluster: SlurmCluster) -> tuple[int, int]:
    """Submit the sweep, and return the job numbers of the array and of the table."""
    done = subprocess.run(
        [sys.executable, "-m", "kvdistill", "sweep", "sweep.yaml", "--slurm"],
        cwd=directory,
        env={**cluster.environment, "PYTHONPATH": str(REPOSITORY), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    jobs = re.findall(r"job (\d+)", done.stdout)
    return int(jobs[0]), int(jobs[1])


def test_array_runs_the_remaining_runs_and_then_writes_the_table(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP), encoding="utf-8")
    fail = tmp_path / "out" / "runs" / "right" / "fail"
    fail.parent.mkdir(parents=True)
    fail.touch()
    with SlurmCluster(tmp_path / "slurm", 2) as cluster:
        array, table = submitted(tmp_path, cluster)
        assert cluster.wait(table, 90)["JobState"] == "COMPLETED"
        states = re.findall(r"JobState=(\w+)", cluster.call("scontrol", "show", "job", str(array)))
        assert sorted(states) == ["COMPLETED", "COMPLETED", "FAILED", "FAILED"]
        logs = tmp_path / "out" / "logs"
        assert "right/seed1: `train` ended with code 3" in (logs / f"{array}_1.log").read_text(encoding="utf-8")
        output = (logs / f"table_{table}.log").read_text(encoding="utf-8")
        assert "2 of 4 runs are not done and not in the table: right/seed0, right/seed1" in output
        fail.unlink()
        array, table = submitted(tmp_path, cluster)
        assert cluster.wait(table, 90)["JobState"] == "COMPLETED"
        assert sorted(path.name for path in logs.glob(f"{array}_*.log")) == [f"{array}_0.log", f"{array}_1.log"]
    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert text.count("±") == 6
    assert text.count("| 2 |") == 2

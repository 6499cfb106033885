"""Tests of `kvdistill sweep` on the command line, with a fast stand-in for the trainer."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.servers import REPOSITORY, wait_until

pytestmark = pytest.mark.slow

TRAINER = "python -m tests.support.stand_in_trainer"
EVALUATOR = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
for name in ("model_path", "output_file"): parser.add_argument("--" + name, type=pathlib.Path)
parser.add_argument("--eval_datasets", nargs="+")
flags = parser.parse_args()
assert flags.model_path.is_dir()
if pathlib.Path("no_evaluation").exists(): raise SystemExit(4)
found = {name: {"dataset": name, "metric": "m", "score": 40.0, "num_examples": 5} for name in flags.eval_datasets}
flags.output_file.write_text(json.dumps({**found, "average": 40.0}))
"""


class Sweep:
    """The file of a sweep, and `kvdistill sweep` for it."""

    def __init__(self, directory: Path, **changes: Any) -> None:
        self.directory, self.out = directory, directory / "out"
        self.file = directory / "sweep.yaml"
        tree = {
            "output_dir": "out",
            "seeds": [0, 1, 2],
            "flags": {"student_model_name_or_path": "tiny", "teacher_models": ["a", "b"], "max_steps": 3},
            "matrix": {"kv_compression": ["right", "r-kv"]},
            "command": TRAINER,
            **changes,
        }
        self.file.write_text(yaml.safe_dump(tree), encoding="utf-8")
        self.environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    def start(self, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "kvdistill", "sweep", "sweep.yaml", *flags]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.directory, env=self.environment, stdout=pipe, stderr=pipe, text=True, encoding="utf-8"
        )

    def run(self, *flags: str, code: int = 0) -> str:
        """Run the command, check its exit status, and return its output; on an error, its error output."""
        process = self.start(*flags)
        printed, errors = process.communicate(timeout=60)
        assert process.returncode == code, printed + errors
        return printed + errors

    def log(self, run: str, step: str = "train") -> Path:
        return self.out / "runs" / run / "logs" / f"{step}.log"

    def rows(self) -> list[dict[str, str]]:
        with (self.out / "table.csv").open(encoding="utf-8") as file:
            return list(csv.DictReader(file))


def test_sweep_writes_a_table_and_skips_finished_runs(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    printed = sweep.run()
    runs = [f"{option}/seed{seed}" for option in ("right", "r-kv") for seed in range(3)]
    assert [line.split(",")[0] for line in printed.splitlines()[:12]] == [
        line for number, run in enumerate(runs, start=1) for line in (f"done  {run}", f"runs: {number}/6")
    ]
    table = (sweep.out / "table.md").read_text(encoding="utf-8")
    assert table in printed
    rows = sweep.rows()
    assert [row["kv_compression"] for row in rows] == ["right", "r-kv"]
    for row in rows:
        by_seed = [float(value) for value in row["val_by_seed"].split()]
        assert len(set(by_seed)) == 3
        assert float(row["val"]) == pytest.approx(sum(by_seed) / 3)
        assert float(row["val_low"]) < float(row["val"]) < float(row["val_high"])
        assert f"| {row['kv_compression']} | {float(row['val']):.1f} ± " in table
    before = {path: path.stat().st_mtime_ns for path in (sweep.out / "runs").rglob("*.log")}
    assert len(before) == 6
    assert sweep.run().startswith(table)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sweep.run("--list").count("  done  ") == 6


def test_failed_run_does_not_stop_others_and_is_retried(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    fail = sweep.out / "runs" / "right" / "fail"
    fail.parent.mkdir(parents=True)
    fail.touch()
    printed = sweep.run(code=1)
    assert "3 of 6 runs failed" in printed
    assert "FAILED  right/seed1: `train` ended with code 3" in printed
    assert "flags [" in printed
    assert "3 of 6 runs are not done and not in the table: right/seed0, right/seed1, right/seed2" in printed
    empty, full = sweep.rows()
    assert (empty["val"], empty["seeds"], full["seeds"]) == ("", "", "0 1 2")
    fail.unlink()
    printed = sweep.run()
    assert "done  right/seed2\nruns: 3/3, 0:00:00 left\n" in printed
    assert "r-kv/seed" not in printed
    assert all(row["seeds"] == "0 1 2" for row in sweep.rows())


def test_finished_runs_with_other_settings_raise(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    sweep.run("--set", "seeds=[0]")
    printed = sweep.run("--set", "flags.max_steps=4", code=2)
    assert "right/seed0 has a finished training with other settings" in printed
    assert not (sweep.out / "runs" / "right" / "seed1").exists()
    # Changed locations and additional seeds are allowed.
    sweep.run("--set", "flags.teacher_device=cpu", "--set", "seeds=[0, 1]")


def test_command_that_does_not_train_fails(tmp_path: Path) -> None:
    printed = Sweep(tmp_path, command="true").run(code=1)
    assert "`train` succeeded but wrote no training run" in printed


def test_training_saves_after_sigterm_and_the_sweep_continues(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    wait = sweep.out / "runs" / "right" / "wait"
    wait.parent.mkdir(parents=True)
    wait.touch()
    process = sweep.start()
    try:
        wait_until(lambda: (wait.parent / "seed0" / "waiting").exists(), 20)
        assert "right/seed0: locked by another sweep" in sweep.run("--task", "0", code=1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert sweep.log("right/seed0").read_text(encoding="utf-8").endswith("checkpoint saved\n")
    assert not (sweep.out / "runs" / "right" / "seed1").exists()
    wait.unlink()
    sweep.run()
    assert all(row["seeds"] == "0 1 2" for row in sweep.rows())


def test_best_model_of_every_stage_is_evaluated(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "multi_task_eval.py").write_text(EVALUATOR, encoding="utf-8")
    evaluation = {"eval_datasets": ["gsm8k_test", "bbh"]}
    sweep = Sweep(tmp_path, matrix={"kv_loss_type": ["mse"]}, evaluation=evaluation, seeds=[0, 1])
    phases = ("--set", "flags.train_phase=all")
    (tmp_path / "no_evaluation").touch()
    assert "`evaluate0` ended with code 4" in sweep.run(*phases, code=1)
    assert sweep.run(*phases, "--list").count("  trained  ") == 2
    (tmp_path / "no_evaluation").unlink()
    trained = sweep.log("mse/seed0").stat().st_mtime_ns
    sweep.run(*phases)
    assert sweep.log("mse/seed0").stat().st_mtime_ns == trained
    assert [(row["stage"], row["gsm8k_test"], row["seeds"]) for row in sweep.rows()] == [
        ("stage1", "40.0", "0 1"),
        ("stage2", "40.0", "0 1"),
    ]
    # Other datasets are evaluated without training again.
    sweep.run(*phases, "--set", "evaluation.eval_datasets=[gpqa]")
    assert sweep.log("mse/seed0").stat().st_mtime_ns == trained
    assert sweep.rows()[0]["gpqa"] == "40.0"


def test_array_has_the_remaining_runs_one_per_task(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, slurm={"partition": "gpu", "gres": "gpu:8"}, max_parallel=2)
    assert sweep.run("--task", "1").startswith("right/seed1: ")
    assert not (sweep.out / "table.csv").exists()
    assert "--task: the sweep has runs 0 to 5, got 6" in sweep.run("--task", "6", code=2)
    submitted = tmp_path / "bin"
    submitted.mkdir()
    (submitted / "sbatch").write_text(f'#!/bin/sh\ncp "$2" {submitted}/\necho "7;cluster"\n', encoding="utf-8")
    (submitted / "sbatch").chmod(0o755)
    sweep.environment["PATH"] = f"{submitted}:{sweep.environment['PATH']}"
    assert "submitted 5 of 6 runs as job 7, and the table as job 7, which runs after it" in sweep.run("--slurm")
    array, table = ((submitted / f"{name}.sbatch").read_text(encoding="utf-8") for name in ("array", "table"))
    for line in ("#SBATCH --array=0,2,3,4,5%2\n", "#SBATCH --gres=gpu:8\n", "#SBATCH --partition=gpu\n", "pipefail"):
        assert line in array
    assert (sweep.out / "logs").is_dir()
    (copy,) = sweep.out.glob("submitted_*.yaml")
    assert array.rstrip().endswith(f'sweep {copy} --task "$SLURM_ARRAY_TASK_ID"')
    assert "#SBATCH --dependency=afterany:7\n" in table
    assert "gres" not in table
    assert table.rstrip().endswith(f"sweep {copy} --table")
    # The tasks read the copy, so a change of the file does not affect them.
    listed = sweep.run("--list")
    sweep.file.write_text(copy.read_text(encoding="utf-8"), encoding="utf-8")
    assert sweep.run("--list") == listed
    assert "exclude each other" in sweep.run("--list", "--task", "1", code=2)
    (submitted / "sbatch").write_text("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n", encoding="utf-8")
    assert "invalid partition" in sweep.run("--slurm", code=1)


def test_slurm_flag_without_sbatch_raises(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    sweep.environment["PATH"] = str(tmp_path)
    assert "--slurm: there is no sbatch on the PATH" in sweep.run("--slurm", code=2)

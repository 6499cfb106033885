"""Tests of diverged runs: every rank reports the error in one line, and no infinite or NaN values are saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
from safetensors.torch import load_file

from tests.support.training import Endpoints, World, start_cli

pytestmark = pytest.mark.slow

RANKS = 2


def failed_log(config: dict[str, Any], directory: Path) -> str:
    """Run a training that has to fail, and return its log."""
    process, log = start_cli(config, RANKS, directory)
    try:
        assert process.wait(240) != 0, "a diverged run must fail"
    finally:
        process.kill()
    return log.read_text(encoding="utf-8")


def messages(log: str) -> list[str]:
    """The last message of every rank, without the rank number."""
    lines = [line.partition("rank ")[2] for line in log.splitlines() if line.startswith("kvdistill: rank ")]
    assert sorted(line[0] for line in lines) == [str(rank) for rank in range(RANKS)], log[-4000:]
    return [line[3:] for line in lines]


def refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is not JSON")


def assert_saved_values_are_finite(output: Path) -> None:
    for path in output.rglob("*.safetensors"):
        if path.name != "frozen.safetensors":  # Calibration stores NaN for what it did not measure.
            assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
    for path in (*output.rglob("*.json"), *output.rglob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("stage", [2])
def test_divergence_fails_on_every_rank_and_keeps_the_last_finite_checkpoint(
    world: World, endpoints: Endpoints, tmp_path: Path, stage: int
) -> None:
    run = {"zero_stage": stage, "save_every": 1, "eval_every": 2}
    config = world.config(f"rate-zero{stage}", endpoints, optim={"lr": 1e30}, run=run)
    output = Path(config["run"]["output_dir"])
    first = messages(failed_log(config, tmp_path))
    assert first[0] == first[1], "all ranks report the same"
    assert first[0].startswith("step 2: the run diverged; not finite: "), first[0]
    assert " loss" in first[0]
    assert "optim.lr" in first[0]
    assert_saved_values_are_finite(output)
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000001"]
    assert not (output / "best_model").exists()
    again = failed_log(config, tmp_path)
    assert "resuming from" in again
    assert messages(again) == first


@pytest.mark.parametrize("stage", [0, 3])
def test_infinite_parameters_of_the_last_step_are_not_saved(
    world: World, endpoints: Endpoints, tmp_path: Path, stage: int
) -> None:
    optim = {"lr": 100.0, "weight_decay": 1e38, "warmup_ratio": 0.0}
    data = {"val": None}
    config = world.config(
        f"decay-zero{stage}", endpoints, optim=optim, data=data, run={"steps": 1, "zero_stage": stage}
    )
    output = Path(config["run"]["output_dir"])
    for line in messages(failed_log(config, tmp_path)):
        assert line.startswith("step 1: the run diverged; not finite: parameters or optimizer moments; no checkpoint")
    assert not (output / "best_model").exists()
    assert not (output / "summary.json").exists()
    assert not (output / "checkpoints").exists()

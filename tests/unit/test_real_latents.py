"""Tests of the comparison of losses on latents on a real model: the arms' configurations and the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.real import latents
from experiments.real.latents import ARMS, LATENTS, PER_STEP, LatentArm, LatentRun, latent_config, run_name, table
from experiments.real.maps_config import FULL
from experiments.real.real_config import RealPaths
from experiments.real.real_results import RealRunResult
from kvcore.config import parse
from student_trainer.config import TrainConfig

PATHS = RealPaths(Path("outputs/maps"), quick=False)


def tree(arm: LatentArm) -> dict[str, Any]:
    return parse(latent_config(arm, 2, FULL, PATHS, 50051), TrainConfig).model_dump(mode="json")


def test_arms_start_from_the_same_student_and_differ_only_in_their_losses() -> None:
    trees = {arm.name: tree(arm) for arm in ARMS}
    assert {one["student"]["path"] for one in trees.values()} == {"outputs/maps/full/runs/healing60-seed2/best_model"}
    shared = [
        {key: one[key] for key in ("data", "optim", "align", "fuse")} for one in trees.values() if one["teachers"]
    ]
    assert len(shared) == 3
    assert all(one == shared[0] for one in shared)
    assert {(one["student"]["latents"], one["student"]["passes"]) for one in trees.values()} == {(LATENTS, 3)}
    weights = {name: (bool(one["teachers"]), one["loss"]["step_ce_weight"]) for name, one in trees.items()}
    assert weights == {
        "ce": (False, 0.0),
        "kv": (True, 0.0),
        "step": (False, 1.0),
        "kv_step": (True, 1.0),
        "shuffled_step": (True, 1.0),
    }
    assert {name for name, one in trees.items() if one["kv"]["control"] == "shuffled"} == {"shuffled_step"}
    assert {one["student"]["latents_per_step"] for one in trees.values() if one["loss"]["step_ce_weight"]} == {PER_STEP}


def test_runs_of_an_arm_have_their_own_folders() -> None:
    names = {run_name(arm, seed) for arm in ARMS for seed in (0, 1)}
    assert len(names) == 2 * len(ARMS)


def run_of(answer_ce: float, kv_loss: float | None = None, accuracy: float = 0.0) -> LatentRun:
    held_out = {"answer_ce": answer_ce} | ({} if kv_loss is None else {"kv_loss": kv_loss})
    return LatentRun(RealRunResult("run", held_out, {}, {}, {}, 0.0, None, None, None, 0.0), accuracy)


def test_table_has_means_and_differences_paired_by_seed() -> None:
    arms = {
        "ce": [run_of(1.0), run_of(2.0), run_of(3.0)],
        "kv": [run_of(0.5, 0.9), run_of(1.5, 0.8), run_of(2.5, 0.7, 0.25)],
    }
    _, _, reference, kv = table(arms).splitlines()
    assert reference == "| cross-entropy alone | 1.000 / 2.000 / 3.000 | 2.000 ± 2.484 | - | - | 0.0% / 0.0% / 0.0% |"
    difference = "| 1.500 ± 2.484 | -0.500 ± 0.000 |"
    assert kv == f"| K/V | 0.500 / 1.500 / 2.500 {difference} 0.900 / 0.800 / 0.700 | 0.0% / 0.0% / 25.0% |"
    assert table({"kv": arms["kv"]}).splitlines()[2].split(" | ")[3] == "-"


def test_unknown_arm_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        latents.main(["--arms", "kx"])
    assert "invalid choice: 'kx'" in capsys.readouterr().err


def test_steps_of_the_table_are_those_of_all_arms() -> None:
    assert latent_config(ARMS[0], 0, replace(FULL, steps=7), PATHS, 1)["run"]["steps"] == 7

"""Tests of runs with a curriculum of latent steps, with real servers and real DeepSpeed ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from data.records import load_records, write_records
from tests.support.training import (
    LATENTS,
    LOSSES,
    Endpoints,
    World,
    assert_same_losses,
    copy_checkpoint,
    metrics,
    train,
)

pytestmark = pytest.mark.slow

PARTS = ("train/answer_ce", "train/rest_ce", "train/step_ce", "train/reasoning_ce", "train/codi_loss")


def test_a_run_stopped_inside_a_stage_continues_exactly(world: World, endpoints: Endpoints, tmp_path: Path) -> None:
    # One step of the reasoning per line; two optimiser steps of 8 samples per stage.
    records = [replace(one, reasoning=one.reasoning.replace(" ", "\n ")) for one in load_records(world.train)]
    write_records(tmp_path / "train.jsonl", records)
    whole = world.config(
        "curriculum",
        endpoints,
        student={"latents_per_step": 1},
        loss={"step_ce_weight": 0.5, "step_ce_passes": "all", "codi_weight": 0.3},
        data={"train": str(tmp_path / "train.jsonl")},
        run={"curriculum_epochs": 16 / len(records), "save_every": 3, "eval_every": 3},
    )
    (uninterrupted,) = train([whole], 2, tmp_path)
    stages = metrics(uninterrupted, "curriculum/stage")
    assert stages == {1: 1, 2: 1, 3: 2, 4: 2, 5: 3, 6: 3}
    rest = metrics(uninterrupted, "train/rest_ce")
    assert {step for step, value in rest.items() if value > 0} == {1, 2, 3, 4}, "the last stage has no text"
    for latent in range(1, LATENTS + 1):
        assert sorted(metrics(uninterrupted, f"val/kv_loss/latent{latent}")) == [3, 6], "validation uses all latents"

    copy_checkpoint(uninterrupted, 3, tmp_path / "resumed")
    whole["run"] |= {"output_dir": str(tmp_path / "resumed")}
    (resumed,) = train([whole], 2, tmp_path)
    assert_same_losses(uninterrupted, resumed, 0.0, (*LOSSES, *PARTS))
    assert metrics(resumed, "curriculum/stage") == stages
    ours, theirs = (
        load_file(run / "checkpoints/step-00000006/weights.safetensors") for run in (resumed, uninterrupted)
    )
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_stages_are_logged_apart(world: World, tmp_path: Path) -> None:
    """A mean over steps of two stages would be that of neither."""
    config = world.config(
        "logged",
        {},
        student={"latents_per_step": 1},
        loss={"step_ce_weight": 0.5},
        run={"curriculum_epochs": 16 / len(load_records(world.train)), "log_every": 4},
    )
    (output,) = train([config], 1, tmp_path)
    assert metrics(output, "curriculum/stage") == {2: 1, 4: 2, 6: 3}

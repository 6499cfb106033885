"""Tests of runs in which the student is its own teacher, under real DeepSpeed and without any server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support.training import (
    LATENTS,
    LOSSES,
    OTHER_ORDER,
    World,
    assert_same_losses,
    copy_checkpoint,
    metrics,
    start_cli,
    train,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

NAMES = (*LOSSES, "val/kv_loss", "val/loss", "train/kv_weight")
SELECTION = {"selector": "r_kv", "scope": "head", "importance_weight": 0.1, "budget": LATENTS}


def config_of(world: World, output: Path, **changes: Any) -> dict[str, Any]:
    kv = {"selection": SELECTION, **changes.pop("kv", {})}
    run = {"output_dir": str(output), "eval_every": 3, **changes.pop("run", {})}
    return world.config("unused", {}, self_teacher=True, kv=kv, run=run, **changes)


def test_zero_stages_and_checkpointing_give_the_same_losses(world: World, tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "zero0": {"run": {"zero_stage": 0}},
        "zero2": {},
        "zero3": {"run": {"zero_stage": 3}},
        "checkpointing": {"student": {"gradient_checkpointing": True}},
        "shuffled": {"kv": {"control": "shuffled"}},
        "lora": {"student": {"lora": {"r": 4, "alpha": 8}, "gradient_checkpointing": True}},
    }
    runs = [config_of(world, tmp_path / name, **change) for name, change in changes.items()]
    first, *others, shuffled, lora = train(runs, 2, tmp_path)
    for other in others:
        assert_same_losses(first, other, OTHER_ORDER, NAMES)
    assert len(set(metrics(first, "train/kv_loss").values())) == 6, "the losses move"
    assert metrics(shuffled, "train/kv_loss")[1] != pytest.approx(metrics(first, "train/kv_loss")[1], rel=1e-3)
    assert len(set(metrics(lora, "train/kv_loss").values())) == 6


def test_a_resumed_run_equals_the_uninterrupted_one(world: World, tmp_path: Path) -> None:
    changes = {"loss": {"kv_weight": "auto", "kv_decay": "linear"}, "student": {"lora": {"r": 4, "dropout": 0.1}}}
    (whole,) = train([config_of(world, tmp_path / "whole", **changes, run={"save_every": 3})], 2, tmp_path)
    resumed: list[dict[str, Any]] = []
    for stage in (2, 0):
        copy = tmp_path / f"zero{stage}"
        copy_checkpoint(whole, 3, copy)
        resumed.append(config_of(world, copy, **changes, run={"save_every": 3, "zero_stage": stage}))
    same_stage, other_stage = train(resumed, 2, tmp_path)
    assert_same_losses(whole, same_stage, 0.0, NAMES)
    assert_same_losses(whole, other_stage, OTHER_ORDER, NAMES)
    ours, theirs = (load_file(run / "checkpoints/step-00000006/weights.safetensors") for run in (same_stage, whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_stages_learn_and_write_every_file_without_a_teacher(world: World, tmp_path: Path) -> None:
    longer = {"steps": 30, "best_by": "kv_loss", "eval_every": 30, "save_every": 10}
    stages = [
        {"name": "text", "loss": {"kv_weight": 0.0}, "run": {"steps": 4, "best_by": "loss"}},
        {"name": "latents", "run": longer},
    ]
    config = config_of(world, tmp_path / "run", stages=stages)
    process, log = start_cli(config, 2, tmp_path)
    try:
        assert process.wait(240) == 0, log.read_text(encoding="utf-8")[-6000:]
    finally:
        process.kill()
    output = tmp_path / "run" / "latents"
    losses = list(metrics(output, "train/kv_loss").values())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert set(metrics(output, "train/kv_weight").values()) == {5.0}
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert summary["val_kv_loss"] == pytest.approx(metrics(output, "val/kv_loss")[30])
    assert (summary["bytes_per_sample"], summary["stall_fraction"], summary["alignment"]) == (0.0, 0.0, {})
    assert not (output / "alignment.json").exists()
    results = json.loads((output / "eval_results.json").read_text(encoding="utf-8"))["val"]
    assert results["kv_loss"] == summary["val_kv_loss"]
    assert len(results["kv_error"]["k"]) == 2
    assert "learns from itself" in (output / "run.html").read_text(encoding="utf-8")
    assert "The student itself" in (output / "best_model" / "README.md").read_text(encoding="utf-8")
    assert "kvdistill_sdpa" not in (output / "best_model" / "config.json").read_text(encoding="utf-8")

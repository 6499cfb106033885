"""Tests of training runs with real servers and real DeepSpeed ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer.model.latent import load_reasoning
from tests.support.training import LATENTS, LOSSES, Endpoints, World, assert_same_losses, metrics, train

pytestmark = pytest.mark.slow


def test_every_zero_stage_gives_the_same_losses(world: World, endpoints: Endpoints, tmp_path: Path) -> None:
    runs = [world.config(f"zero{stage}", endpoints, run={"zero_stage": stage}) for stage in range(4)]
    first, *others = train(runs, 2, tmp_path)
    for other in others:
        assert_same_losses(first, other, 1e-5)
    assert len(set(metrics(first, "train/loss").values())) == 6, "the losses move"


@pytest.mark.parametrize("direction", ["to_student", "to_teacher"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    world: World, endpoints: Endpoints, tmp_path: Path, direction: str
) -> None:
    whole = world.config(f"whole-{direction}", endpoints, align={"direction": direction}, run={"save_every": 3})
    (uninterrupted,) = train([whole], 2, tmp_path)
    resumed: list[dict] = []
    for stage in (2, 3):
        copy = tmp_path / f"resumed{stage}"
        for name in ("checkpoints/step-00000003", "metrics.jsonl"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            copier = shutil.copytree if (uninterrupted / name).is_dir() else shutil.copy
            copier(uninterrupted / name, copy / name)
        config = world.config("unused", endpoints, align={"direction": direction}, run={"save_every": 3})
        config["run"] |= {"output_dir": str(copy), "zero_stage": stage}
        resumed.append(config)
    same_stage, other_stage = train(resumed, 2, tmp_path)
    assert_same_losses(uninterrupted, same_stage, 0.0)
    assert_same_losses(uninterrupted, other_stage, 1e-5)
    ours, theirs = (
        load_file(run / "checkpoints/step-00000006/weights.safetensors") for run in (same_stage, uninterrupted)
    )
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    (one_rank,) = train([{**resumed[0], "run": resumed[0]["run"] | {"output_dir": str(tmp_path / "one")}}], 1, tmp_path)
    assert_same_losses(uninterrupted, one_rank, 1e-4)


def test_recording_then_offline_gives_the_online_losses(world: World, endpoints: Endpoints, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    run = {"steps": None, "epochs": 1}
    online, record = (
        world.config("online", endpoints, run=run),
        world.config("record", endpoints, run=run, kv={"mode": "record", "store": store}),
    )
    nobody = [{"name": "ada"}, {"name": "ben"}]
    offline = world.config("offline", endpoints, run=run, kv={"mode": "offline", "store": store}, teachers=nobody)
    by_online, by_record = train([online, record], 2, tmp_path)
    (by_offline,) = train([offline], 2, tmp_path)
    assert_same_losses(by_online, by_record, 0.0)
    assert_same_losses(by_record, by_offline, 0.0, (*LOSSES, "val/kv_loss", "val/task_metrics/accuracy"))


def test_token_mode_with_bf16_checkpointing_and_a_trained_adapter_learns(
    world: World, endpoints: Endpoints, tmp_path: Path
) -> None:
    every_token = {"selector": "full", "budget": 0, "span": "all"}
    longer = {"steps": 30}
    runs = [
        world.config("token", endpoints, student={"mode": "token"}, kv={"selection": every_token}, run=longer),
        world.config("bf16", endpoints, student={"dtype": "bf16"}, run=longer | {"zero_stage": 3}),
        world.config("checkpointing", endpoints, student={"gradient_checkpointing": True}, run={"zero_stage": 3}),
        world.config("plain", endpoints),
        world.config("linear", endpoints, align={"head_adapter": "linear", "direction": "to_teacher"}, run=longer),
    ]
    token, bf16, checkpointing, plain, linear = train(runs, 2, tmp_path)
    assert_same_losses(plain, checkpointing, 1e-5)
    for run in (token, bf16, linear):
        losses = list(metrics(run, "train/kv_loss").values())
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), run.name


def test_a_run_saves_a_model_that_transformers_loads_and_all_metrics(
    world: World, endpoints: Endpoints, tmp_path: Path
) -> None:
    (output,) = train([world.config("figures", endpoints, run={"zero_stage": 3})], 2, tmp_path)
    lm = AutoModelForCausalLM.from_pretrained(output / "best_model")
    AutoTokenizer.from_pretrained(output / "best_model")
    reasoning = load_reasoning(lm, output / "best_model", LATENTS, 2)
    assert reasoning is not None
    weights = load_file(output / "checkpoints/step-00000006/weights.safetensors")
    assert lm.state_dict()["lm_head.weight"].equal(weights["student.lm.lm_head.weight"])
    assert reasoning.first_inputs.weight.equal(weights["student.reasoning.first_inputs.weight"])
    logged = {name for line in (output / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    assert logged >= {
        "train/loss",
        "train/ce_loss",
        "train/kv_loss",
        "val/kv_loss",
        "val/task_metrics/accuracy",
        "kv/stall_fraction",
        "kv/bytes_per_sample",
        "routing/weights_mean/ada",
        "routing/weights_mean/ben",
    }
    assert list((output / "tensorboard").glob("events.*"))
    summary = json.loads((output / "summary.json").read_text())
    assert summary["steps"] == 6
    assert 0 < summary["bytes_per_sample"] < summary["raw_bf16_bytes_per_sample"]
    assert summary["alignment"]["ada"]["explained_variance"]["k"][0] <= 1.0

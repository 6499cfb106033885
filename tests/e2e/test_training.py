"""Tests of training runs with real servers and real DeepSpeed ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data.records import load_records, write_records
from student_trainer.model.latent import load_reasoning
from student_trainer.model.pretrained import load_pretrained
from tests.support.training import (
    LATENTS,
    LOSSES,
    OTHER_ORDER,
    Endpoints,
    World,
    assert_same_losses,
    copy_checkpoint,
    metrics,
    train,
)

pytestmark = pytest.mark.slow


def test_every_zero_stage_gives_the_same_losses(world: World, endpoints: Endpoints, tmp_path: Path) -> None:
    steps = {"student": {"latents_per_step": LATENTS}, "loss": {"step_ce_weight": 0.5}, "data": {"answer_tokens": 12}}
    runs = [world.config(f"zero{stage}", endpoints, **steps, run={"zero_stage": stage}) for stage in range(4)]
    first, *others = train(runs, 2, tmp_path)
    for other in others:
        assert_same_losses(first, other, OTHER_ORDER, (*LOSSES, "train/step_ce", "val/step_ce"))
        assert metrics(other, "val/unfinished_answers") == metrics(first, "val/unfinished_answers")
    assert len(set(metrics(first, "train/loss").values())) == 6, "the losses move"


@pytest.mark.parametrize("direction", [pytest.param("to_student", marks=pytest.mark.nightly), "to_teacher"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    world: World, endpoints: Endpoints, tmp_path: Path, direction: str
) -> None:
    # Of several lengths, so that samples are sorted.
    records = [
        replace(record, prompt=record.prompt * (1 + at % 3)) for at, record in enumerate(load_records(world.train))
    ]
    write_records(tmp_path / "train.jsonl", records)
    changes: dict[str, Any] = {"align": {"direction": direction}, "data": {"train": str(tmp_path / "train.jsonl")}}
    whole = world.config(f"whole-{direction}", endpoints, **changes, run={"save_every": 3})
    (uninterrupted,) = train([whole], 2, tmp_path)
    resumed: list[dict] = []
    for folder, stage in (("same", 2), ("other", 3), ("one", 2)):
        copy = tmp_path / folder
        copy_checkpoint(uninterrupted, 3, copy)
        config = world.config("unused", endpoints, **changes, run={"save_every": 3})
        config["run"] |= {"output_dir": str(copy), "zero_stage": stage}
        resumed.append(config)
    same_stage, other_stage = train(resumed[:2], 2, tmp_path)
    assert_same_losses(uninterrupted, same_stage, 0.0)
    assert_same_losses(uninterrupted, other_stage, OTHER_ORDER)
    ours, theirs = (
        load_file(run / "checkpoints/step-00000006/weights.safetensors") for run in (same_stage, uninterrupted)
    )
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    # As many samples at the same time as on two ranks.
    new = {**resumed[0], "run": resumed[0]["run"] | {"output_dir": str(tmp_path / "new"), "micro_batch": 4}}
    for one_rank in train([resumed[2], new], 1, tmp_path):
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


def test_a_run_saves_the_trained_student_and_all_metrics(world: World, endpoints: Endpoints, tmp_path: Path) -> None:
    (output,) = train([world.config("figures", endpoints, run={"zero_stage": 3, "save_every": 6})], 2, tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(output / "best_model", trust_remote_code=False)
    lm, _ = load_pretrained(str(output / "best_model"), "auto", "path")
    reasoning = load_reasoning(lm, output / "best_model", LATENTS, 2)
    assert reasoning is not None
    weights = load_file(output / "checkpoints/step-00000006/weights.safetensors")
    assert lm.state_dict()["lm_head.weight"].equal(weights["student.lm.lm_head.weight"])
    assert reasoning.first_inputs.weight.equal(weights["student.reasoning.first_inputs.weight"])
    card = (output / "best_model" / "README.md").read_text(encoding="utf-8")
    score = json.loads((output / "eval_results.json").read_text(encoding="utf-8"))["average"]
    assert f" | accuracy | {score:.1f} | " in card
    assert all(f"\n| {name} | " in card for name in endpoints)
    logged = {name for line in (output / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    assert logged >= {
        "train/loss",
        "train/ce_loss",
        "train/kv_loss",
        "val/ce_loss",
        "val/answer_ce",
        "val/perplexity",
        "val/kv_loss",
        f"val/kv_loss/latent{LATENTS}",
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

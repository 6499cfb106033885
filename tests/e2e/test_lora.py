"""Tests of students with LoRA under real DeepSpeed: every ZeRO stage, resume, and what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kvcore.types import Tensor
from student_trainer.config import LoraConfig
from student_trainer.model.lora import add_lora
from student_trainer.model.pretrained import load_pretrained
from tests.support.training import OTHER_ORDER, Endpoints, World, assert_same_losses, copy_checkpoint, metrics, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

LORA: dict[str, Any] = {"r": 4, "alpha": 8, "dropout": 0.1}
LAST = "checkpoints/step-00000006"


def lora_config(world: World, endpoints: Endpoints, output: Path, **changes: Any) -> dict[str, Any]:
    config = world.config("unused", endpoints)
    config["student"] |= {"lora": LORA, **changes.pop("student", {})}
    config["run"] |= {"output_dir": str(output), "save_every": 3, **changes.pop("run", {})}
    return config


@torch.no_grad()
def logits(lm: Any) -> Tensor:
    ids = torch.randint(3, 384, (2, 9), generator=torch.Generator().manual_seed(0))
    return lm.eval()(input_ids=ids).logits


def trained_student(world: World, output: Path) -> Any:
    """The student with the adapters of its last checkpoint, not merged."""
    lm = AutoModelForCausalLM.from_pretrained(world.student)
    add_lora(lm, LoraConfig.model_validate(LORA), "base", seed=9)
    weights = load_file(output / LAST / "weights.safetensors")
    prefix = "student.lm."
    state = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    _, unexpected = lm.load_state_dict(state, strict=False)
    assert not unexpected
    return lm


def check_saved(world: World, output: Path) -> None:
    """Checkpoints hold only what is trained; merged model and adapter alone give the trained student's logits."""
    base = AutoModelForCausalLM.from_pretrained(world.student)
    before, expected = logits(base), logits(trained_student(world, output))
    assert (before - expected).abs().max() > 0.05, "training changed the logits"
    names = load_file(output / LAST / "weights.safetensors").keys()
    assert all(".lora_" in name for name in names if name.startswith("student.lm."))
    best = output / "best_model"
    merged, _ = load_pretrained(str(best), "auto", "path")  # Raises if a weight is missing, or has another name.
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    adapter = PeftModel.from_pretrained(base, best / "adapter")
    torch.testing.assert_close(logits(adapter), expected, atol=1e-5, rtol=0)


def test_every_zero_stage_trains_the_same_adapters_and_saves_them_merged(
    world: World, endpoints: Endpoints, tmp_path: Path
) -> None:
    stages = [
        lora_config(world, endpoints, tmp_path / f"zero{stage}", run={"zero_stage": stage, "best_by": "loss"})
        for stage in (0, 2, 3)
    ]
    for config in stages:
        del config["data"]["val"]  # So that the best model is the last one.
    first, *others = outputs = train(stages, 2, tmp_path)
    for other in others:
        assert_same_losses(first, other, OTHER_ORDER)
    assert len(set(metrics(first, "train/loss").values())) == 6, "the losses move"
    for output in outputs:
        check_saved(world, output)


@pytest.mark.nightly
def test_a_resumed_run_equals_the_uninterrupted_one(world: World, endpoints: Endpoints, tmp_path: Path) -> None:
    (whole,) = train([lora_config(world, endpoints, tmp_path / "whole")], 2, tmp_path)
    resumed: list[dict[str, Any]] = []
    for stage in (2, 3):
        copy = tmp_path / f"resumed{stage}"
        copy_checkpoint(whole, 3, copy)
        resumed.append(lora_config(world, endpoints, copy, run={"zero_stage": stage}))
    same_stage, other_stage = train(resumed, 2, tmp_path)
    assert_same_losses(whole, same_stage, 0.0)
    assert_same_losses(whole, other_stage, OTHER_ORDER)
    ours, theirs = (load_file(run / LAST / "weights.safetensors") for run in (same_stage, whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.nightly
def test_checkpointing_and_bf16_and_token_mode_train_adapters(
    world: World, endpoints: Endpoints, tmp_path: Path
) -> None:
    every_token = {"kv": {"selection": {"selector": "full", "budget": 0, "span": "all"}}}
    students: dict[str, dict[str, Any]] = {
        "plain": {},
        "checkpointing": {"gradient_checkpointing": True},
        "bf16": {"dtype": "bf16"},
        "token": {"mode": "token", "gradient_checkpointing": True, "lora": LORA | {"target_modules": ["v_proj"]}},
    }
    configs: list[dict[str, Any]] = []
    for name, student in students.items():
        run = {"zero_stage": 3 if name != "plain" else 2, "steps": 30 if name in ("bf16", "token") else 6}
        configs.append(lora_config(world, endpoints, tmp_path / name, student=student, run=run))
    configs[-1]["kv"] |= every_token["kv"]
    configs[-1]["loss"] |= {"kv_weight": "auto"}
    configs[-1]["optim"] |= {"lr": 0.03}  # One adapter per layer learns little in 30 steps.
    plain, checkpointing, bf16, token = train(configs, 2, tmp_path)
    assert_same_losses(plain, checkpointing, OTHER_ORDER)
    for run in (bf16, token):
        losses = list(metrics(run, "train/loss").values())
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), run.name

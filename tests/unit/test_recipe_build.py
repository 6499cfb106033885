"""Tests of the trainer configuration that is built from the recipe's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.recipe.build import DataFiles, train_config
from experiments.recipe.config import RecipeSettings
from experiments.recipe.run_recipe import check, serve_flags
from kvcore.errors import ConfigError, FieldError
from student_trainer.config import TrainConfig

DATA = DataFiles(Path("train.jsonl"), Path("val.jsonl"))
ENDPOINTS = {"Qwen2.5-7B": ["n1:1"], "Qwen2.5-14B": ["n2:2", "n3:3"]}


def settings(**changes: Any) -> RecipeSettings:
    given = {
        "student_model_name_or_path": "Qwen/Qwen2.5-1.5B",
        "teacher_models": ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-14B"),
        "output_dir": Path("out"),
    }
    return RecipeSettings(**{**given, **changes})


def config(world_size: int = 1, **changes: Any) -> TrainConfig:
    return train_config(settings(**changes), ENDPOINTS, DATA, world_size)


def test_flags_reach_the_trainer() -> None:
    built = config(
        world_size=4,
        fixed_weights=(0.25, 0.75),
        kv_compression="r_kv",
        kv_loss_type="mse",
        kv_loss_weight=0.1,
        layer_map_strategy="cka",
        head_adapt_strategy="pool",
        learning_rate=1e-4,
        warmup_ratio=0.2,
        max_grad_norm=0.5,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=5,
        num_train_epochs=2,
        eval_steps=11,
        save_steps=12,
        metric_for_best_model="eval_kv_loss",
        logging_steps=13,
        bf16=False,
        gradient_checkpointing=False,
    )
    assert [(teacher.name, teacher.endpoints, teacher.weight) for teacher in built.teachers] == [
        ("Qwen2.5-7B", ("n1:1",), 0.25),
        ("Qwen2.5-14B", ("n2:2", "n3:3"), 0.75),
    ]
    assert (built.kv.selection.selector, built.kv.selection.budget) == ("r_kv", 24)
    assert (built.loss.kv_loss, built.loss.kv_weight) == ("mse", 0.1)
    assert (built.align.layer_map, built.align.head_adapter) == ("cka", "pool")
    assert (built.optim.lr, built.optim.warmup_ratio, built.optim.max_grad_norm) == (1e-4, 0.2, 0.5)
    assert (built.run.global_batch, built.run.micro_batch, built.run.epochs, built.run.steps) == (60, 3, 2, None)
    assert (built.run.eval_every, built.run.save_every, built.run.log_every) == (11, 12, 13)
    assert built.run.best_by == "kv_loss"
    assert (built.student.dtype, built.student.gradient_checkpointing) == ("fp32", False)
    assert config(max_steps=7).run.epochs is None


def test_training_phase_selects_the_fusion_strategy() -> None:
    assert [config(train_phase=phase).fuse.kind for phase in ("1", "2", "3")] == ["fixed", "similarity", "learnable"]
    router = config(fusion_strategy="learnable", router_type="gate", router_hidden_dim=8, entropy_reg_weight=0.05).fuse
    assert (router.router, router.router_width, router.entropy_weight) == ("gate", 8, 0.05)
    warm = config(fusion_strategy="similarity", similarity_metric="dot", temperature=0.7).fuse
    assert (warm.metric, warm.temperature, warm.temperature_decay) == ("dot", 0.7, 0.0)


def test_phase_all_gives_three_stages_in_the_guides_folders() -> None:
    built = config(train_phase="all", head_adapt_strategy="linear", layer_map_strategy="learned")
    stages = [built.stage(index) for index in range(3)]
    assert [stage.run.output_dir.name for stage in stages] == ["stage1_fixed", "stage2_similarity", "stage3_learnable"]
    assert [stage.fuse.kind for stage in stages] == ["fixed", "similarity", "learnable"]
    # Trainable alignment needs a router, so the earlier stages use the fixed defaults.
    assert [stage.align.head_adapter for stage in stages] == ["ridge", "ridge", "linear"]
    assert [stage.align.layer_map for stage in stages] == ["ratio", "ratio", "learned"]
    assert stages[2].student.path == "out/stage2_similarity/best_model"


@pytest.mark.parametrize(
    ("mode", "compression", "selected", "time"),
    [
        ("latent", "right", ("right", 24, "reasoning"), "none"),
        ("latent", "full", ("full", 0, "reasoning"), "linear"),
        ("token", "full", ("full", 0, "all"), "none"),
        ("token", "r_kv", ("r_kv", 24, "reasoning"), "none"),
    ],
)
def test_compression_sets_selection_and_time_alignment(
    mode: str, compression: str, selected: tuple[str, int, str], time: str
) -> None:
    built = config(student_mode=mode, kv_compression=compression)
    selection = built.kv.selection
    assert (selection.selector, selection.budget, selection.span) == selected
    assert built.align.time == time


def test_store_is_in_the_output_directory_by_default() -> None:
    assert config(kv_mode="online").kv.store is None
    assert config(kv_mode="record").kv.store == Path("out/kv_store")
    assert config(kv_mode="offline", kv_store=Path("store")).kv.store == Path("store")


def test_num_teachers_selects_the_first_teachers() -> None:
    assert [teacher.name for teacher in config(num_teachers=1).teachers] == ["Qwen2.5-7B"]


def test_quantised_teachers_use_the_given_compute_dtype() -> None:
    chosen = settings(load_in_4bit=True, bnb_4bit_compute_dtype="float16")
    assert serve_flags(chosen) == {"dtype": "fp16", "load_in_8bit": False, "load_in_4bit": True}
    assert serve_flags(settings())["dtype"] == "auto"


def test_check_raises_for_inconsistent_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FieldError, match=r"no teacher is named 'Qwen2\.5-7'; did you mean 'Qwen2\.5-7B'"):
        check(settings(teacher_endpoints=("Qwen2.5-7=n:1",)), DATA, 1)
    with pytest.raises(FieldError, match=r"teacher 'Qwen2\.5-14B' has no endpoint"):
        check(settings(teacher_endpoints=("Qwen/Qwen2.5-7B=n:1",)), DATA, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="ranks on other nodes cannot reach servers that this command starts"):
        check(settings(), DATA, 4)
    assert check(settings(), DATA, 2) == {}

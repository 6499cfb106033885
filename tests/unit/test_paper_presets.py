"""Tests of configs/papers: every file parses, equals what its script writes, and has the facts of its paper."""

from __future__ import annotations

from typing import Any

import pytest

from kvcore.config import load_config
from scripts.make_paper_presets import FOLDER, main, presets, written_reasoning
from student_trainer.config import TrainConfig
from student_trainer.loop.curriculum import Curriculum, curriculum_of
from student_trainer.loop.sample_order import SampleOrder

MODELS, SETS = ("qwen0.5b", "llama1b", "llama3b"), ("aug", "nl")
# a1, a2, KV loss, layer std, lambda, projection, learning rate, weight decay, epochs: KaVa's table.
KAVA = {
    ("llama1b", "aug"): (10, 1, "smooth_l1", "layer", 0.1, True, 8e-4, 0.1, 10),
    ("llama1b", "nl"): (10, 1, "mse", "layer", 0.1, True, 8e-4, 0.1, 10),
    ("llama3b", "aug"): (20, 2, "smooth_l1", "none", 0.1, True, 2e-4, 0.1, 5),
    ("llama3b", "nl"): (20, 2, "smooth_l1", "none", 0.0, False, 2e-4, 0.1, 5),
    ("qwen0.5b", "aug"): (10, 1, "mse", "none", 0.1, True, 5e-4, 0.01, 10),
    ("qwen0.5b", "nl"): (10, 1, "mse", "layer", 0.1, True, 8e-4, 0.1, 10),
}


def read(method: str, model: str, data: str, **changes: Any) -> TrainConfig:
    overrides = [f"{key}={value}" for key, value in changes.items()]
    return load_config(FOLDER / f"{method}_{model}_{data}.yaml", overrides, TrainConfig)


def comment(method: str, model: str, data: str) -> str:
    lines = (FOLDER / f"{method}_{model}_{data}.yaml").read_text(encoding="utf-8").splitlines()
    return " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))


def test_files_are_what_the_script_writes() -> None:
    assert main(["--check"]) == 0, "run python -m scripts.make_paper_presets"
    assert len(presets()) == 24


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.yaml")))
def test_every_preset_parses_and_says_where_its_values_come_from(name: str) -> None:
    config = load_config(FOLDER / name, [], TrainConfig)
    method, model, data = name.removesuffix(".yaml").split("_")
    assert config.run.output_dir.name == name.removesuffix(".yaml")
    assert config.data.train.parent.name == {"aug": "gsm8k_aug", "nl": "gsm8k_aug_nl"}[data]
    assert config.data.steps == {"aug": "equations", "nl": "lines"}[data]
    text = comment(method, model, data)
    without_row = method == "lotus" and model != "llama3b"
    found = "Not run here." if without_row else "Not reproduced here."
    for part in ("(arXiv ", " Source: ", " Differs here: ", found, f"--config configs/papers/{name}"):
        assert part in text


@pytest.mark.parametrize(("model", "data"), KAVA)
def test_kava_has_the_hyperparameters_of_its_table(model: str, data: str) -> None:
    config = read("kava", model, data)
    loss, optim, selection, lora = config.loss, config.optim, config.kv.selection, config.student.lora
    found = (loss.codi_weight, loss.kv_weight, loss.kv_loss, loss.kv_scale, selection.importance_weight)
    found += (config.student.projection, optim.lr, optim.weight_decay, config.run.epochs)
    assert found == KAVA[model, data]
    assert (config.student.latents, config.student.passes, selection.budget) == (24, 3, 24)
    assert (selection.selector, selection.span, selection.scope) == ("r_kv", "reasoning", "head")
    assert lora is not None
    assert (lora.r, lora.alpha, lora.dropout) == (128, 32, 0.1)
    assert (config.run.global_batch, optim.max_grad_norm, optim.schedule) == (128, 2.0, "cosine")
    assert config.data.drop_last_step
    assert loss.reasoning_ce_weight == 1.0
    assert config.self_teacher
    assert config.teachers == ()


@pytest.mark.parametrize(("method", "latents", "passes"), [("codi", 6, 6), ("pccot", 24, 3)])
def test_codi_and_pccot_have_their_latents_and_no_kv_loss(method: str, latents: int, passes: int) -> None:
    for model, data in KAVA:
        config = read(method, model, data)
        assert (config.student.latents, config.student.passes) == (latents, passes)
        assert config.student.projection
        assert config.teachers == ()
        assert not config.self_teacher
        assert config.loss.codi_weight == KAVA[model, data][0]
        assert config.data.drop_last_step


@pytest.mark.parametrize("data", SETS)
def test_lotus_has_the_blocks_and_the_loop_of_its_paper(data: str) -> None:
    config = read("lotus", "llama3b", data)
    student, loss, optim = config.student, config.loss, config.optim
    assert (student.latents, student.latents_per_step, student.passes, student.lora) == (150, 25, 6, None)
    assert (loss.step_ce_weight, loss.codi_weight, loss.reasoning_ce_weight) == (0.05, 0.0, 0.0)
    assert (optim.lr, optim.weight_decay, optim.max_grad_norm, optim.schedule) == (5e-5, 0.01, 1.0, "constant")
    assert (config.run.epochs, config.run.global_batch) == (30, 128)
    curriculum = curriculum_of(config, SampleOrder(config.run, 385_000, 0, 1))
    assert curriculum == Curriculum(stages=6, steps_per_stage=3008), "an epoch each"
    assert not config.data.drop_last_step


@pytest.mark.parametrize("model", MODELS)
def test_lotus_begins_with_training_on_written_reasoning(model: str) -> None:
    changes = written_reasoning("outputs/written")
    config = read("lotus", model, "aug", **changes)
    assert (config.student.mode, config.student.latents_per_step, config.run.epochs) == ("token", None, 10)
    assert config.run.curriculum_epochs is None
    text = comment("lotus", model, "aug")
    assert all(text.count(f"--set {key}=") == 1 for key in changes)


@pytest.mark.parametrize(
    ("name", "accuracy"),
    [
        (("kava", "llama1b", "aug"), "56.5 %"),
        (("kava", "qwen0.5b", "nl"), "44.4 %"),
        (("codi", "llama3b", "nl"), "55.9 %"),
        (("pccot", "qwen0.5b", "aug"), "20.5 %"),
        (("lotus", "llama3b", "nl"), "68.1 %"),
    ],
)
def test_comments_have_the_reported_accuracy(name: tuple[str, str, str], accuracy: str) -> None:
    assert f"Reported accuracy on GSM8K: {accuracy}" in comment(*name)


@pytest.mark.parametrize("model", ["qwen0.5b", "llama1b"])
def test_models_without_a_row_say_so(model: str) -> None:
    assert "No row in the paper for this model; taken from its Llama-3.2-3B" in comment("lotus", model, "aug")

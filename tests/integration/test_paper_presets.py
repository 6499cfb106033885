"""Presets of configs/papers with a tiny student: what a run of each method reads, and two steps of KaVa's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.families import find_family
from data.prompts import record_of
from data.reasoning_steps import steps_of
from data.records import Record, write_records
from kvcore.config import load_config
from scripts.make_paper_presets import FOLDER
from student_trainer.config import TrainConfig
from student_trainer.loop.training_context import build_context
from tests.support.guide_data import MAKERS
from tests.support.tiny_models import save_tiny_model, tiny_spec
from tests.support.training import metrics, start_training

pytestmark = pytest.mark.slow

SMALLER: dict[str, object] = {
    "student.dtype": "fp32",
    "student.latents": 3,
    "kv.selection.budget": 3,
    "student.lora.r": 4,
    "align.calibration_samples": 16,
    "run.epochs": "null",
    "run.steps": 2,
    "run.global_batch": 4,
    "run.micro_batch": 2,
    "run.eval_every": 0,
    "run.save_every": 0,
    "run.log_every": 1,
}


SPEC = tiny_spec("llama", layers=2, seed=3)
SHAPES: dict[str, dict[str, object]] = {
    "codi_llama1b_aug": {"student.latents": 3},
    "pccot_qwen0.5b_nl": {"student.latents": 3},
    "lotus_llama3b_nl": {"student.latents": 6, "student.latents_per_step": 3, "run.curriculum_epochs": 0.2},
}


def write_data(directory: Path, family: str) -> list[Record]:
    questions = [find_family(family).parse(MAKERS[family](index)) for index in range(24)]
    records = [record_of(question, "cot", "en", f"r{index}") for index, question in enumerate(questions)]
    write_records(directory / "train.jsonl", records[:20])
    write_records(directory / "val.jsonl", records[20:])
    return records


def paths_of(directory: Path) -> dict[str, object]:
    data = {f"data.{split}": directory / f"{split}.jsonl" for split in ("train", "val")}
    return {"student.path": directory / "student", **data, "run.output_dir": directory / "run"}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", SHAPES)
def test_a_run_has_the_records_and_the_latents_of_its_preset(name: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "student", SPEC)
    family, drops = "gsm8k_aug" if name.endswith("aug") else "gsm8k_aug_nl", not name.startswith("lotus")
    whole = write_data(tmp_path, family)
    changes = SMALLER | SHAPES[name] | paths_of(tmp_path)
    if not drops:
        del changes["student.lora.r"]
    del changes["kv.selection.budget"]
    overrides = [f"{key}={value}" for key, value in changes.items()]
    context = build_context(load_config(FOLDER / f"{name}.yaml", overrides, TrainConfig), 0, 1)
    kind = context.config.data.steps
    for found, given in zip([*context.train, *context.val], whole, strict=True):
        assert steps_of(found.reasoning, kind) == steps_of(given.reasoning, kind)[: 1 if drops else 2]
        assert (found.id, found.prompt, found.answer) == (given.id, given.prompt, given.answer)
    assert context.model.student.reasoning.projects == drops
    # A step in each of the two stages.
    assert [context.latent_steps(step) for step in range(2)] == ([None, None] if drops else [1, 2])
    context.close()


@pytest.mark.parametrize(("data", "projects"), [("aug", True), pytest.param("nl", False, marks=pytest.mark.slow)])
def test_kava_preset_trains_a_tiny_student(data: str, projects: bool, tmp_path: Path) -> None:
    name, family = f"kava_llama3b_{data}", "gsm8k_aug" if data == "aug" else "gsm8k_aug_nl"
    save_tiny_model(tmp_path / "student", SPEC)
    write_data(tmp_path, family)
    paths = paths_of(tmp_path)
    overrides = [part for key, value in (SMALLER | paths).items() for part in ("--set", f"{key}={value}")]
    command = ["kvdistill", "train", "--config", str(FOLDER / f"{name}.yaml"), *overrides]
    log = tmp_path / "train.log"
    assert start_training(command, 1, log).wait(300) == 0, log.read_text(encoding="utf-8")[-6000:]
    for loss in ("train/kv_loss", "train/codi_loss", "train/reasoning_ce"):
        assert len(metrics(tmp_path / "run", loss)) == 2, loss
    tree: dict[str, Any] = json.loads((tmp_path / "run/best_model/config.json").read_text(encoding="utf-8"))
    assert (tree["latents"], tree["passes"], tree["projection"]) == (3, 3, projects)
    card = (tmp_path / "run/best_model/README.md").read_text(encoding="utf-8")
    settings = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert settings["data"]["drop_last_step"] is True
    assert settings["self_teacher"] is True

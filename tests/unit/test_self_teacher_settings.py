"""Tests of the settings of runs in which the student is its own teacher, and of what such runs write about it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.records import write_records
from kvcore.config import parse
from kvcore.errors import ConfigError, FieldError
from kvcore.plan import SELECTORS, Selection
from kvcore.tensors.select import select, select_layers, select_sample
from student_trainer.config import TrainConfig
from student_trainer.loop import ds_engine
from student_trainer.loop.data_survey import survey
from student_trainer.loop.run_identity import differences, run_identity
from student_trainer.loop.stages import _digest
from student_trainer.monitoring.run_page import render_page
from student_trainer.monitoring.run_state import RunState
from tests.support.selection_batches import HEADS, LAYERS, random_batch
from tests.support.training_parts import RECORDS, collator, one_rank, train_config

SLOTS = {"selector": "r_kv", "budget": 3, "scope": "head"}


def tree(**sections: Any) -> dict[str, Any]:
    return {
        "student": {"path": "student", "latents": 3},
        "self_teacher": True,
        "kv": {"selection": SLOTS},
        "data": {"train": "train.jsonl", "val": "val.jsonl"},
        "run": {"output_dir": "out", "steps": 10},
    } | sections


def slots(**changes: Any) -> dict[str, Any]:
    return {"selection": SLOTS | changes}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"loss": {"kv_weight": "auto", "kv_loss": "mse", "codi_weight": 10.0}},
        {"align": {"calibration_samples": 16}},
        {"kv": slots(selector="uniform", scope="sample")},
        {"kv": {"selection": SLOTS, "control": "shuffled", "on_missing": "mask"}},
        {"run": {"output_dir": "out", "steps": 1, "best_by": "kv_loss"}},
        {"student": {"path": "student", "latents": 3, "lora": {}}},
    ],
)
def test_a_student_may_be_its_own_teacher(sections: dict[str, Any]) -> None:
    assert parse(tree(**sections), TrainConfig).self_teacher


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"teachers": [{"name": "ada", "endpoints": ["h:1"]}]}, r"^self_teacher: true conflicts with teachers"),
        ({"student": {"path": "student", "mode": "token"}}, r"^self_teacher: .*got 'token'"),
        ({"loss": {"reasoning_ce_weight": 0.0}}, r"^loss\.reasoning_ce_weight: .*above 0"),
        (
            {"kv": {"selection": SLOTS, "mode": "record", "store": "s"}},
            r"^kv\.mode: .*cannot be stored.*'record'",
        ),
        ({"kv": {"selection": SLOTS, "mode": "offline", "store": "s"}}, r"^kv\.mode: .*got mode 'offline'"),
        ({"kv": {"selection": SLOTS, "store": "s"}}, r"^kv\.store: .*got store 's'"),
        ({"kv": slots(span="all", scope="sample")}, r"^kv\.selection\.span: .*got 'all'"),
        ({"kv": slots(budget=4)}, r"^kv\.selection: latent mode matches 3 latents"),
        ({"kv": {"selection": {"selector": "full"}}}, r"^kv\.selection: latent mode matches 3 latents"),
        (
            {
                "kv": {"selection": SLOTS, "control": "shuffled"},
                "run": {"output_dir": "out", "steps": 1, "micro_batch": 1},
            },
            r"^kv\.control: .*run\.micro_batch must be at least 2; got 1",
        ),
        ({"kv": {"selection": SLOTS, "codec": {"name": "int4"}}}, r"^kv\.codec\.name: is for other teachers.*'int4'"),
        ({"kv": {"selection": SLOTS, "min_teachers": 1}}, r"^kv\.min_teachers"),
        ({"align": {"time": "linear"}}, r"^align\.time: is for other teachers.*'linear'"),
        ({"align": {"head_adapter": "identity"}}, r"^align\.head_adapter: is for other teachers"),
        ({"align": {"warmup_steps": 5}}, r"^align\.warmup_steps: is for other teachers.*'5'"),
        ({"align": {"recalibrate_every": 5}}, r"^align\.recalibrate_every: is for other teachers"),
        ({"fuse": {"kind": "similarity"}}, r"^fuse\.kind: is for other teachers"),
        ({"self_teacher": 1}, r"^self_teacher"),
    ],
)
def test_settings_that_make_no_sense_with_it_are_refused_by_name(sections: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse(tree(**sections), TrainConfig)


def test_a_stage_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"loss\.reasoning_ce_weight"):
        parse(tree(stages=[{"name": "one", "loss": {"reasoning_ce_weight": 0.0}}]), TrainConfig)


def test_a_finished_stage_of_another_teacher_is_not_one_of_the_student_itself(tmp_path: Path) -> None:
    data = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "val")}
    for path in data.values():
        write_records(Path(path), RECORDS)
    own, none = (parse(tree(data=data, self_teacher=is_own), TrainConfig) for is_own in (True, False))
    assert _digest(own) != _digest(none)


def test_a_run_resumes_only_with_the_same_self_teacher_and_selection(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    write_records(path, RECORDS)
    data = {"train": str(path)}

    def identity(**kv: Any) -> dict[str, Any]:
        return run_identity(train_config(self_teacher=True, data=data, kv=kv), len(RECORDS), {})

    without = run_identity(train_config(data=data), len(RECORDS), {})
    assert "self_teacher" not in without, "runs of versions without the setting resume"
    now = identity()
    assert differences(copy.deepcopy(now), now) == []
    assert differences(without, now) == ["self_teacher: False then, True now"]
    assert differences(now, without) == ["self_teacher: True then, False now"]
    other = identity(selection={"selector": "uniform", "budget": 3})
    assert differences(now, other) == ["kv.selection.selector: 'right' then, 'uniform' now"]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ds_engine, "device", lambda: torch.device("cpu"))
    with one_rank():
        yield


@pytest.mark.usefixtures("one_process")
def test_samples_without_reasoning_are_refused_unless_they_may_be_missing() -> None:
    records = [*RECORDS[:3], replace(RECORDS[3], reasoning="")]
    with pytest.raises(FieldError, match=r"^kv\.selection\.span: .*have no reasoning"):
        survey(train_config(self_teacher=True), collator(), records, RECORDS[4:8])
    survey(train_config(self_teacher=True, kv={"on_missing": "mask"}), collator(), records, RECORDS[4:8])


def test_the_page_of_a_run_names_the_student_as_its_teacher() -> None:
    page = render_page(train_config(self_teacher=True), RunState().snapshot())
    assert "tiny learns from itself" in page


@pytest.mark.parametrize("selector", [name for name in SELECTORS if name != "full"])
@pytest.mark.parametrize("scope", ["head", "layer", "sample"])
def test_all_layers_at_once_are_selected_as_one_after_the_other(selector: str, scope: Any) -> None:
    candidates_BN, k_BLHTD, importance_BLHT = random_batch(4)
    selection, seeds_B = Selection(selector=selector, budget=3, scope=scope), torch.arange(4) * 99
    found = select_layers(selection, candidates_BN, k_BLHTD, importance_BLHT, seeds_B)
    choosers = {"head": (LAYERS, HEADS), "layer": (LAYERS, 1), "sample": (1, 1)}[scope]
    assert found.shape == (4, *choosers, 3)
    for layer in range(choosers[0]):
        if scope == "sample" and selector in ("r_kv", "r_kv_centred", "keydiff"):
            expected = select_sample(selection, candidates_BN, k_BLHTD, importance_BLHT)
        else:
            one = (k_BLHTD[:, layer], importance_BLHT[:, layer])
            expected = select(selection, candidates_BN, *one, layer=layer, seeds_B=seeds_B)
        assert found[:, layer].equal(expected)

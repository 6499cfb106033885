"""Tests of TrainConfig: which settings it accepts and refuses before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from kvcore.config import load_config, parse
from kvcore.errors import ConfigError
from student_trainer.config import TrainConfig
from tests.support.servers import REPOSITORY

LATENT = {"path": "student", "mode": "latent", "latents": 3}
THREE_SLOTS = {"selection": {"selector": "r_kv", "budget": 3}}


def tree(**sections: Any) -> dict[str, Any]:
    return {
        "student": {"path": "student", "mode": "token"},
        "teachers": [{"name": "ada", "endpoints": ["localhost:50051"]}],
        "kv": {"selection": {"selector": "full"}},
        "data": {"train": "train.jsonl"},
        "run": {"output_dir": "out", "steps": 1},
    } | sections


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "a/b", "", "x" * 65])
def test_teacher_name_that_is_no_plain_folder_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        parse(tree(teachers=[{"name": name, "endpoints": ["localhost:50051"]}]), TrainConfig)


@pytest.mark.parametrize("name", ["ada", "qwen2.5-7b", "_x", "0", "x" * 64])
def test_plain_teacher_names_are_accepted(name: str) -> None:
    assert parse(tree(teachers=[{"name": name, "endpoints": ["h:1"]}]), TrainConfig).teachers[0].name == name


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_token_mode_needs_the_scope_sample(scope: str) -> None:
    with pytest.raises(ConfigError, match=f"token mode.*got '{scope}'"):
        parse(tree(kv={"selection": {"selector": "full", "scope": scope}}), TrainConfig)


@pytest.mark.parametrize("selection", [{"selector": "full"}, {"selector": "right", "budget": 4}])
def test_latent_mode_needs_as_many_slots_as_latents(selection: dict[str, Any]) -> None:
    student = {"path": "student", "mode": "latent", "latents": 3}
    with pytest.raises(ConfigError, match="3 latents"):
        parse(tree(student=student, kv={"selection": selection}), TrainConfig)


@pytest.mark.parametrize("selection", [{"selector": "full"}, {"selector": "right", "budget": 4}])
def test_resampling_accepts_any_number_of_slots(selection: dict[str, Any]) -> None:
    parse(tree(student=LATENT, kv={"selection": selection}, align={"time": "segment"}), TrainConfig)


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"align": {"time": "linear"}}, "align.time: token mode"),
        ({"align": {"tokens": "overlap"}}, "align.tokens: 'overlap' needs every token's first byte"),
        ({"align": {"head_adapter": "linear"}}, "align.head_adapter: 'linear' .* needs fuse.kind"),
        ({"align": {"layer_map": "learned"}}, "align.layer_map: .*needs fuse.kind 'learnable'"),
        (
            {"align": {"layer_map": "learned", "direction": "to_teacher"}},
            "align.layer_map: .*needs fuse.kind 'learnable'",
        ),
        ({"align": {"direction": "to_teacher"}, "fuse": {"kind": "similarity"}}, "fuse.kind: .*set align.direction"),
        ({"loss": {"codi_weight": 1.0}}, "loss.codi_weight: CODI needs student.mode 'latent'"),
        (
            {
                "student": LATENT,
                "kv": THREE_SLOTS,
                "loss": {"codi_weight": 1.0, "reasoning_ce_weight": 0.0},
            },
            "loss.codi_weight: CODI needs .*reasoning_ce_weight above 0",
        ),
        ({"fuse": {"kind": "learnabel"}}, "fuse.kind"),
        ({"fuse": {"temperature": 0.2}}, "fuse.* temperature_floor: 0.5 is above fuse.temperature"),
        ({"align": {"direction": "to_teacher", "head_adapter": "identity"}}, "align.head_adapter: 'identity' leaves"),
        (
            {
                "student": LATENT,
                "kv": {"selection": {"selector": "full", "span": "answer"}},
                "align": {"time": "linear"},
            },
            "align.time: .*got 'answer' and 'sample'",
        ),
        ({"fuse": {"collapse_at": 0.4}}, "fuse.collapse_at"),
        ({"run": {"output_dir": "out", "steps": 1, "best_by": "kv_loss"}, "teachers": []}, "run.best_by"),
        (
            {"fuse": {"kind": "learnable"}, "kv": {"selection": {"selector": "right", "budget": 24, "scope": "head"}}},
            "kv.selection",
        ),
        (
            {
                "fuse": {"kind": "learnable"},
                "kv": {"selection": {"selector": "right", "budget": 24, "span": "prompt", "scope": "sample"}},
            },
            "kv.selection",
        ),
        ({"loss": {"kv_weight": "automatic"}}, "loss.kv_weight"),
    ],
)
def test_incompatible_settings_are_refused_with_the_field(sections: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse(tree(**sections), TrainConfig)


def test_trainable_alignment_is_accepted_with_a_loss_that_trains_it() -> None:
    align = {"layer_map": "learned", "head_adapter": "linear"}
    parse(tree(align=align, fuse={"kind": "learnable"}), TrainConfig)
    parse(tree(align={"head_adapter": "linear", "direction": "to_teacher"}), TrainConfig)


def staged(*stages: dict[str, Any]) -> dict[str, Any]:
    data = {"train": "train.jsonl", "val": "val.jsonl"}
    return tree(student=LATENT, kv=THREE_SLOTS, data=data, stages=list(stages))


def test_stage_overrides_sections_and_starts_from_the_previous_best_model() -> None:
    config = parse(
        staged({"name": "one"}, {"name": "two", "fuse": {"kind": "similarity"}, "run": {"steps": 7}}), TrainConfig
    )
    one, two = config.stage(0), config.stage(1)
    assert (one.student.path, str(one.run.output_dir), one.fuse.kind, one.run.steps) == (
        "student",
        "out/one",
        "fixed",
        1,
    )
    assert (two.student.path, str(two.run.output_dir)) == ("out/one/best_model", "out/two")
    assert (two.fuse.kind, two.run.steps, two.stages) == ("similarity", 7, ())
    assert two.student.latents == 3
    nested = parse(staged({"name": "one", "kv": {"selection": {"selector": "uniform"}}}), TrainConfig).stage(0)
    assert (nested.kv.selection.selector, nested.kv.selection.budget) == ("uniform", 3)


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        ([{"name": "one"}, {"name": "one"}], "stages: names must differ"),
        ([{"name": "a/b"}], "stages.0.name"),
        ([{"name": "one"}, {"name": "two", "fuse": {"kind": "best"}}], "stages.1.fuse.kind"),
        ([{"name": "one", "fuse": {"knd": "fixed"}}], "stages.0.fuse.knd: unknown key; did you mean 'kind'"),
        ([{"name": "one", "run": {"output_dir": "x"}}], "stages.0.run.output_dir: belongs to all stages"),
        ([{"name": "one", "run": {"resume": "never"}}], "stages.0.run.resume: belongs to all stages"),
        ([{"name": "one"}, {"name": "two", "data": {"val": None}}], "stages.1.data.val"),
        ([{"name": "one", "align": {"direction": "to_teacher"}, "fuse": {"kind": "similarity"}}], "fuse.kind"),
    ],
)
def test_invalid_stage_is_refused_with_its_field(stages: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse(staged(*stages), TrainConfig)


def test_stages_need_validation_data() -> None:
    with pytest.raises(ConfigError, match=r"data\.val: is required with stages"):
        parse(staged({"name": "one"}) | {"data": {"train": "train.jsonl"}}, TrainConfig)


def test_shipped_three_stage_configuration_is_valid_and_can_be_overridden() -> None:
    path = REPOSITORY / "configs" / "train" / "three_stage.yaml"
    config = load_config(path, ["stages.2.fuse.router=gate", "run.epochs=3"], TrainConfig)
    stages = [config.stage(index) for index in range(3)]
    assert [stage.fuse.kind for stage in stages] == ["fixed", "similarity", "learnable"]
    assert [str(stage.run.output_dir) for stage in stages] == [
        f"outputs/three_stage_routing/{name}" for name in ("stage1_fixed", "stage2_similarity", "stage3_learnable")
    ]
    assert stages[2].fuse.router == "gate"
    assert {stage.run.epochs for stage in stages} == {3}

"""Tests of TrainConfig: which settings it accepts and refuses before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvcore.config import load_config, parse
from kvcore.errors import ConfigError, FieldError
from kvcore.plan import Selection
from student_trainer.config import TrainConfig
from student_trainer.config_checks import shared_endpoint_warning
from tests.support.servers import REPOSITORY

LATENT = {"path": "student", "mode": "latent", "latents": 3}
THREE_SLOTS = {"selection": {"selector": "r_kv", "budget": 3}}


TWO = [{"name": name, "endpoints": ["localhost:50051"]} for name in ("ada", "ben")]
MAPPED = {"map_at": "teacher", "direction": "to_student"}


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
    parse(tree(student=LATENT, kv={"selection": selection}, align={"time": "linear"}), TrainConfig)


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"align": {"time": "linear"}}, "align.time: token mode"),
        ({"align": {"tokens": "overlap"}}, "align.tokens: 'overlap' needs every token's first byte"),
        (
            {"align": {"head_adapter": "linear", "direction": "to_student"}},
            "align.head_adapter: 'linear' .* needs fuse.kind",
        ),
        ({"align": {"head_adapter": "linear"}, "teachers": TWO}, "align.head_adapter: 'linear' .* needs fuse.kind"),
        ({"align": {"warmup_steps": 1}}, r"align.warmup_steps: 1 must be below run.steps \(1\)"),
        ({"align": {"recalibrate_every": 1}}, "align.recalibrate_every: no map stays frozen .* to_teacher"),
        (
            {"align": {"basis_rank": 4, "direction": "to_student"}},
            "align.basis_rank: .* need align.direction 'to_teacher'; got 'to_student'",
        ),
        ({"align": {"basis_rank": 4}, "teachers": TWO}, "align.basis_rank: .*got 'to_student'"),
        ({"align": {"basis_rank": 4, "head_adapter": "pool"}}, "align.basis_rank: .*'ridge' or 'linear'; got 'pool'"),
        ({"align": {"basis_rank": 4, "layer_map": "ratio"}}, "align.basis_rank: .*'ratio' mixes layers"),
        (
            {"align": {"ridge_rank": 4}},
            "align.ridge_rank: needs align.direction 'to_student'; got 'to_teacher'",
        ),
        (
            {"align": {"ridge_rank": 4, "direction": "to_student", "head_adapter": "procrustes"}},
            "align.ridge_rank: needs align.head_adapter 'ridge'; got 'procrustes'",
        ),
        ({"align": {"ridge_rank": 0, "direction": "to_student"}}, "align.ridge_rank"),
        ({"align": {"map_at": "teacher"}}, "align.map_at: align.direction 'to_teacher' maps the student's K/V"),
        ({"align": MAPPED | {"layer_map": "cka"}}, "align.map_at: align.layer_map 'cka' needs the K/V of all layers"),
        ({"align": MAPPED | {"head_adapter": "identity"}}, "align.map_at: .*'identity' has no map to apply"),
        ({"align": MAPPED | {"recalibrate_every": 2}}, "align.map_at: align.recalibrate_every needs whole K/V"),
        (
            {
                "align": MAPPED,
                "teachers": [TWO[0] | {"kv_map": "ada.kvmap"}],
                "kv": {"selection": {"selector": "full"}, "codec": {"name": "pca"}},
            },
            "align.map_at: .*the kv_map of teacher 'ada' is for their own K/V; leave kv_map out",
        ),
        (
            {"align": MAPPED | {"head_adapter": "linear"}, "fuse": {"kind": "learnable"}},
            "align.map_at: align.head_adapter 'linear' is trained.*or use 'trainer'",
        ),
        (
            {"align": MAPPED | {"layer_map": "learned"}, "fuse": {"kind": "learnable"}},
            "align.map_at: align.layer_map 'learned' is trained",
        ),
        (
            {"align": {"recalibrate_every": 1, "head_adapter": "identity"}},
            "align.recalibrate_every: no map .*identity",
        ),
        ({"align": {"layer_map": "learned"}}, "align.layer_map: .*needs fuse.kind 'learnable'"),
        ({"loss": {"kv_scale": "none", "kv_loss": "cosine"}}, "loss.kv_scale: 'none' changes nothing.*'cosine'"),
        ({"loss": {"kv_scale": "none", "kv_loss": "cka"}}, "loss.kv_scale: 'none' changes nothing.*'cka'"),
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
        (
            {"fuse": {"temperature": 0.2, "temperature_floor": 0.3}},
            "^fuse.temperature_floor: 0.3 is above fuse.temperature",
        ),
        (
            {"align": {"direction": "to_teacher", "head_adapter": "identity"}},
            "align.head_adapter: 'identity' has no map",
        ),
        (
            {
                "student": LATENT,
                "kv": {"selection": {"selector": "full", "span": "answer"}},
                "align": {"time": "linear"},
            },
            "align.time: .*got 'answer' and 'sample'",
        ),
        ({"data": {"train": "t.jsonl", "system_prompt": "Be brief."}}, "data.system_prompt"),
        ({"data": {"train": "t.jsonl", "columns": {"prompts": "question"}}}, r"data.columns.prompts: .*'prompt'"),
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
        (
            {"run": {"output_dir": "out", "steps": 1, "zero_stage": 0, "offload_optimizer": True}},
            "offload_optimizer: needs run.zero_stage 1, 2 or 3",
        ),
    ],
)
def test_incompatible_settings_are_refused_with_the_field(sections: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse(tree(**sections), TrainConfig)


def test_the_same_endpoint_twice_is_refused_for_one_teacher_and_warned_of_for_two() -> None:
    twice = [{"name": "ada", "endpoints": ["h:1", "h:2", "h:1"]}]
    with pytest.raises(FieldError, match=r"^teachers\.0\.endpoints: 'h:1' is listed twice"):
        parse(tree(teachers=twice), TrainConfig)
    warning = shared_endpoint_warning(parse(tree(teachers=TWO), TrainConfig))
    assert warning is not None
    for part in ("'ada'", "'ben'", "localhost:50051"):
        assert part in warning
    apart = [{"name": name, "endpoints": [f"h:{port}"]} for port, name in enumerate(("ada", "ben"), start=1)]
    assert shared_endpoint_warning(parse(tree(teachers=apart), TrainConfig)) is None


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**30])
def test_a_seed_beyond_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(FieldError, match=r"^run\.seed: "):
        parse(tree(run={"output_dir": "out", "steps": 10, "seed": seed}), TrainConfig)


@pytest.mark.parametrize(
    ("fuse", "lowest"),
    [({}, 0.5), ({"temperature": 0.2}, 0.2), ({"temperature": 0.7}, 0.5), ({"temperature_floor": 0.1}, 0.1)],
)
def test_temperature_floor_follows_the_temperature(fuse: dict[str, float], lowest: float) -> None:
    assert parse(tree(fuse=fuse), TrainConfig).fuse.lowest_temperature == lowest


DEFAULTS = {"selector": "r_kv", "budget": 24, "span": "reasoning", "scope": "sample"}


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ({}, {}),
        ({"span": "all"}, {"span": "all"}),
        ({"budget": 16}, {"budget": 16}),
        ({"selector": "right"}, {"selector": "right"}),
        ({"selector": "r-kv", "importance_weight": 1.0}, {"importance_weight": 1.0}),
        ({"selector": "full", "span": "all"}, {"selector": "full", "budget": 0, "span": "all"}),
    ],
)
def test_partial_selection_keeps_the_other_defaults(section: dict[str, Any], changes: dict[str, Any]) -> None:
    student = {"path": "student", "mode": "token"}
    config = parse(tree(student=student, kv={"selection": section}), TrainConfig)
    assert config.kv.selection == Selection(**{**DEFAULTS, **changes})
    assert parse(tree(student=student, kv={}), TrainConfig).kv.selection == Selection(**DEFAULTS)


def test_override_changes_one_key_of_the_default_selection(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tree(kv={})), encoding="utf-8")
    config = load_config(path, ["kv.selection.selector=full"], TrainConfig)
    assert (config.kv.selection.selector, config.kv.selection.budget) == ("full", 0)


def test_trainable_alignment_is_accepted_with_a_loss_that_trains_it() -> None:
    align = {"layer_map": "learned", "head_adapter": "linear"}
    parse(tree(align=align, fuse={"kind": "learnable"}), TrainConfig)
    parse(tree(align={"head_adapter": "linear", "direction": "to_teacher"}), TrainConfig)


@pytest.mark.parametrize(
    ("sections", "direction"),
    [
        ({}, "to_teacher"),
        ({"align": {"head_adapter": "linear"}}, "to_teacher"),
        ({"align": {"direction": "to_student"}}, "to_student"),
        ({"teachers": TWO}, "to_student"),
        ({"teachers": TWO, "align": {"direction": "to_teacher"}}, "to_teacher"),
        ({"fuse": {"kind": "similarity"}}, "to_student"),
        ({"align": {"head_adapter": "identity"}}, "to_student"),
    ],
)
def test_direction_auto_is_to_teacher_for_one_teacher_that_needs_no_fusion(
    sections: dict[str, Any], direction: str
) -> None:
    assert parse(tree(**sections), TrainConfig).direction == direction


@pytest.mark.parametrize(
    "align",
    [
        {"direction": "to_student"},
        {"direction": "to_student", "head_adapter": "procrustes"},
        {"direction": "to_teacher", "head_adapter": "procrustes"},
    ],
)
def test_maps_that_stay_frozen_can_be_fitted_again(align: dict[str, Any]) -> None:
    parse(tree(align=align | {"recalibrate_every": 10, "warmup_steps": 0}), TrainConfig)


def test_teachers_can_send_the_components_of_what_they_map() -> None:
    for codec in ({"name": "pca", "quality": 0.2}, {"name": "pca", "bytes_per_token": 40}):
        parse(tree(align=MAPPED, kv={"selection": {"selector": "full"}, "codec": codec}), TrainConfig)


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


def test_stage_that_changes_the_selector_drops_the_options_of_the_old_one() -> None:
    r_kv = {"selector": "r_kv", "budget": 3, "importance_weight": 0.5, "scope": "sample"}
    stage = {"name": "one", "kv": {"selection": {"selector": "full"}}, "align": {"time": "linear"}}
    config = parse(staged(stage) | {"kv": {"selection": r_kv}}, TrainConfig)
    assert config.stage(0).kv.selection == Selection(selector="full")
    again = {"name": "one", "kv": {"selection": {"selector": "r-kv"}}}
    kept = parse(staged(again) | {"kv": {"selection": r_kv}}, TrainConfig).stage(0).kv.selection
    assert (kept.budget, kept.importance_weight) == (3, 0.5)


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

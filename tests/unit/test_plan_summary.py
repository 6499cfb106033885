"""Tests of `kvdistill plan`: what a run requests from each teacher, shown before any server runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcore.config import parse
from kvcore.errors import FieldError, TeacherUnavailableError
from kvdistill.plan_summary import plan_text
from student_trainer.config import TrainConfig
from tests.support.stores import fill
from tests.support.streams import INFO
from tests.support.training import LATENTS, World, make_world

NOWHERE = "127.0.0.1:1"
RIGHT_RAW = {"selection": {"selector": "right", "budget": LATENTS}, "codec": {"name": "raw"}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def config(world: World, **changes: Any) -> TrainConfig:
    tree = world.config("run", {"ada": [NOWHERE], "ben": [NOWHERE]}, **changes)
    return parse(tree, TrainConfig)


def models(world: World) -> list[str]:
    return [f"{name}={path}" for name, path in world.teachers.items()]


def rows(shown: str) -> dict[str, list[str]]:
    """Rows of the last table, keyed by their first word."""
    return {line.split()[0]: line.split() for line in shown.rpartition("\n\n")[2].splitlines()}


def lines_of(table: str, codec: str) -> list[str]:
    """The lines of one codec in the table of choices."""
    found = [line for line in table.splitlines() if codec in line.split()]
    assert len(found) == 2, "one for each teacher"
    return found


def test_plan_shows_layers_tokens_and_bytes_from_model_configurations(world: World) -> None:
    shown = plan_text(config(world), models(world))
    assert "layers of ada  2 of 3: 0, 2" in shown
    assert "layers of ben  2 of 4: 0, 3" in shown
    assert f"r_kv keeps at most {LATENTS} of the reasoning" in shown
    # ada: 2 layers, 2 heads, head dim 16. K and V are int8 with bf16 scales: K per channel, V per token.
    codes = 2 * 2 * LATENTS * 16
    scales = 2 * (16 + LATENTS) * 2
    sample = 2 * (codes + scales) + 4 * LATENTS
    assert rows(shown)["ada"][1:4] == [f"{LATENTS:.1f}", f"{sample / 1000:.1f}", "kB"]
    batch, records = 8, 96
    assert f"{sample * batch / 1000:.1f} kB" in shown
    assert f"{sample * records / 1000:.1f} kB" in shown
    assert rows(shown)["all"][-1] == "Gbit/s"


def test_wider_codec_needs_more_bytes_per_sample(world: World) -> None:
    def sample(**kv: Any) -> float:
        return float(rows(plan_text(config(world, kv=kv), models(world)))["ada"][2])

    selection = {"selector": "r_kv", "budget": LATENTS}
    assert sample(selection=selection, codec={"name": "raw"}) > 2 * sample(selection=selection)


def test_bytes_per_token_set_the_bytes_and_without_them_the_codec_pca_says_how_to_measure_its_own(world: World) -> None:
    kv: dict[str, Any] = {"selection": {"selector": "right", "budget": LATENTS}}
    shown = plan_text(config(world, kv=kv | {"codec": {"name": "pca", "bytes_per_token": 500}}), models(world))
    assert "pca, 500 bytes per token" in shown
    assert rows(shown)["ada"][1:4] == [f"{LATENTS:.1f}", "1.5", "kB"]
    unknown = plan_text(config(world, kv=kv | {"codec": {"name": "pca"}}), models(world))
    assert "pca; the bytes below are those of bf16. kvdistill calibrate measures" in unknown


def test_bytes_of_each_number_of_components_are_shown_where_a_run_can_have_them(world: World) -> None:
    assert "basis_rank" not in plan_text(config(world), models(world)), "fused teachers have no basis"
    align = {"calibration_samples": 48, "direction": "to_teacher"}
    shown = plan_text(config(world, align=align), models(world))
    (table,) = (part for part in shown.split("\n\n") if part.startswith("per sample"))
    assert table.splitlines()[0].split("  ")[-1].strip() == "basis_rank 16"
    # Two layers of one head with 16 components: K has a scale per component, V one per token; and the positions.
    sixteen = 2 * (2 * LATENTS * 16 + 2 * 16 + 2 * LATENTS) + 4 * LATENTS
    for line in lines_of(table, "int8"):
        assert line.split()[-2:] == [f"{sixteen / 1000:.1f}", "kB"], line
    # int4 packs two codes of keys along components and of values along tokens, and sends a mean per component of K.
    packed = 2 * (LATENTS * 8 + -(-LATENTS // 2) * 16 + 2 * 16 + 2 * LATENTS + 2 * 16) + 4 * LATENTS
    for line in lines_of(table, "int4"):
        assert line.split()[-2:] == [f"{packed / 1000:.1f}", "kB"], line
    whole = rows(shown)
    four = plan_text(config(world, align=align | {"basis_rank": 4}), models(world))
    assert "components     4 of each layer" in four
    assert "basis_rank 16  basis_rank 4\n" in four
    size = 2 * (2 * LATENTS * 4 + 2 * 4 + 2 * LATENTS) + 4 * LATENTS
    assert rows(four)["ada"][2:4] == rows(four)["ben"][2:4] == [f"{size / 1000:.1f}", "kB"]
    assert whole["ada"][2:4] != rows(four)["ada"][2:4]
    with pytest.raises(FieldError, match=r"align.basis_rank: got 33, but the teacher has only 32 features per layer"):
        plan_text(config(world, align=align | {"basis_rank": 33}), models(world))


def test_bytes_of_the_students_heads_are_shown_where_teachers_can_map_to_them(world: World) -> None:
    shown = plan_text(config(world, kv=RIGHT_RAW), models(world))
    (table,) = (part for part in shown.split("\n\n") if part.startswith("per sample"))
    assert table.splitlines()[0].endswith("full cache  codec  all heads  map_at teacher")
    # Two layers of one head of 16, K and V in fp32, and the positions.
    mapped = 2 * 2 * LATENTS * 16 * 4 + 4 * LATENTS
    for line in lines_of(table, "raw"):
        assert line.split()[-2:] == [f"{mapped / 1000:.1f}", "kB"], line
    at_teacher = plan_text(config(world, kv=RIGHT_RAW, align={"map_at": "teacher"}), models(world))
    assert "heads          the student's (align.map_at teacher)" in at_teacher
    assert rows(at_teacher)["ada"][2:4] == rows(at_teacher)["ben"][2:4] == [f"{mapped / 1000:.1f}", "kB"]
    assert rows(shown)["ada"][2:4] != rows(at_teacher)["ada"][2:4]
    assert "map_at" not in plan_text(config(world, align={"layer_map": "cka"}), models(world))
    with pytest.raises(FieldError, match=r"^align.map_at: .*align.layer_map 'ratio' mixes .* 4 layers for 3"):
        plan_text(
            config(
                world, align={"map_at": "teacher", "layer_map": "ratio"}, student={"path": str(world.teachers["ada"])}
            ),
            models(world),
        )


def test_components_of_the_students_heads_are_planned(world: World) -> None:
    kv: dict[str, Any] = {"selection": {"selector": "right", "budget": LATENTS}}
    align = {"map_at": "teacher"}
    shown = plan_text(config(world, align=align, kv=kv | {"codec": {"name": "pca"}}), models(world))
    assert "pca; the bytes below are those of bf16, without entropy coding" in shown
    assert "kvdistill calibrate" not in shown
    mapped = 2 * 2 * LATENTS * 16 * 2 + 4 * LATENTS
    assert rows(shown)["ada"][2:4] == [f"{mapped / 1000:.1f}", "kB"]
    per_token = plan_text(
        config(world, align=align, kv=kv | {"codec": {"name": "pca", "bytes_per_token": 400}}), models(world)
    )
    assert rows(per_token)["ada"][2:4] == ["1.2", "kB"]


def test_stages_with_equal_requests_are_shown_together(world: World) -> None:
    stages = [{"name": "first"}, {"name": "second"}, {"name": "third", "kv": {"codec": {"name": "bf16"}}}]
    shown = plan_text(config(world, stages=stages), models(world))
    together, separate = shown.split("stages  ")[1:]
    assert together.startswith("first, second\n")
    assert "int8" in together
    assert separate.startswith("third\n")
    assert "bf16" in separate


def test_offline_run_is_planned_from_its_store(world: World, tmp_path: Path) -> None:
    for name in ("ada", "ben"):
        fill(tmp_path / name)
    offline = config(
        world, kv={"selection": {"selector": "r_kv", "budget": LATENTS}, "mode": "offline", "store": str(tmp_path)}
    )
    assert f"layers of ada  2 of {INFO.layers}: 0, {INFO.layers - 1}" in plan_text(offline, [])


def test_unreachable_server_error_names_teacher_model_flag(world: World) -> None:
    with pytest.raises(
        TeacherUnavailableError, match=r"To plan without its server, add --teacher-model ben=PATH_OR_HUB_ID"
    ):
        plan_text(config(world), models(world)[:1])


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("ada", "--teacher-model: expected NAME=PATH, got 'ada'"),
        ("eve=x", "--teacher-model: unknown teacher 'eve'; teachers of the run: ada, ben"),
        ("ada=nowhere/at_all", "--teacher-model: cannot read the configuration of 'nowhere/at_all'"),
    ],
)
def test_invalid_teacher_model_flag_is_refused(
    world: World, given: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FieldError) as error:
        plan_text(config(world), [given])
    assert str(error.value).startswith(problem)


def test_run_without_teachers_is_refused(world: World) -> None:
    with pytest.raises(FieldError, match="the run has no teachers"):
        plan_text(config(world, teachers=[]), [])


def test_run_whose_student_is_its_own_teacher_is_refused(world: World) -> None:
    given = config(world, teachers=[]).model_copy(update={"self_teacher": True})
    with pytest.raises(FieldError, match=r"^self_teacher: the student is its own teacher, so nothing is sent"):
        plan_text(given, [])

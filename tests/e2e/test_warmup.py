"""Tests of runs that warm up on cross-entropy before alignments are fitted, and that fit them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file

from tests.support.servers import TeacherProcess, running_teacher, start_teacher, wait_until
from tests.support.training import (
    LOSSES,
    OTHER_ORDER,
    Endpoints,
    World,
    assert_same_losses,
    copy_checkpoint,
    metrics,
    start_cli,
    train,
)

pytestmark = pytest.mark.slow

WARMUP, STEPS = 2, 6
TO_STUDENT = {"direction": "to_student", "warmup_steps": WARMUP, "recalibrate_every": 2, "calibration_samples": 48}
TO_TEACHER = {"direction": "to_teacher", "warmup_steps": WARMUP, "calibration_samples": 48}


def warming(world: World, endpoints: Endpoints, name: str, align: dict[str, Any], **run: Any) -> dict[str, Any]:
    return world.config(
        name,
        endpoints,
        align=align,
        loss={"kv_weight": "auto", "kv_decay": "linear"},
        run={"steps": STEPS, "save_every": 1, "eval_every": 2, "keep_checkpoints": 9, **run},
    )


def frozen(output: Path, step: int) -> dict[str, Any]:
    return load_file(output / f"checkpoints/step-{step:08d}/frozen.safetensors")


@pytest.mark.parametrize(
    "align",
    [pytest.param(TO_STUDENT, marks=pytest.mark.nightly), TO_TEACHER],
    ids=lambda align: align["direction"],
)
def test_a_run_that_warms_up_resumes_exactly_before_and_after_its_alignments_are_fitted(
    world: World, endpoints: Endpoints, tmp_path: Path, align: dict[str, Any]
) -> None:
    name = align["direction"]
    alone = {**world.config(f"alone-{name}", {}), "teachers": []}
    (whole, no_teacher) = train([warming(world, endpoints, f"warm-{name}", align), alone], 2, tmp_path)

    asked = metrics(whole, "train/kv_loss")
    assert sorted(asked) == list(range(WARMUP + 1, STEPS + 1)), "nothing is asked for in the warm-up"
    assert sorted(metrics(whole, "kv/bytes_per_sample")) == sorted(asked)
    loss, ce_loss = metrics(whole, "train/loss"), metrics(whole, "train/ce_loss")
    expected = metrics(no_teacher, "train/ce_loss")
    for step in range(1, WARMUP + 1):
        assert loss[step] == ce_loss[step] == expected[step]
    assert sorted(metrics(whole, "val/ce_loss")) == [2, 4, 6]
    assert sorted(metrics(whole, "val/kv_loss")) == [4, 6]
    assert json.loads((whole / "summary.json").read_text(encoding="utf-8"))["best_step"] > WARMUP

    # The weight falls from what was measured at the end of the warm-up to 0.
    measured = float(frozen(whole, STEPS)["kv_weight"])
    weights = {step: measured * (1 - (step - 1 - WARMUP) / (STEPS - WARMUP)) for step in asked}
    assert metrics(whole, "train/kv_weight") == pytest.approx(weights)

    # A checkpoint holds what was fitted before its step: nothing at the end of the warm-up.
    assert frozen(whole, WARMUP) == {}
    first, second = frozen(whole, 4), frozen(whole, STEPS)
    refitted = {key for key in first if not first[key].isnan().any() and not first[key].equal(second[key])}
    assert bool(refitted) == (align is TO_STUDENT)
    if refitted:
        assert "teacher/ada/adapter.maps.k.weight_LFG" in refitted
        assert "kv_weight" not in refitted
    fitted_at = json.loads((whole / "alignment.json").read_text(encoding="utf-8"))["step"]
    assert fitted_at == (4 if align is TO_STUDENT else WARMUP)

    resumed: list[dict[str, Any]] = []
    for step, stage in ((1, 2), (WARMUP, 2), (4, 2), (WARMUP, 0), (1, 3), (4, 3)):
        copy = tmp_path / f"from{step}-zero{stage}"
        copy_checkpoint(whole, step, copy)
        resumed.append(warming(world, endpoints, "unused", align, output_dir=str(copy), zero_stage=stage))
    names = (*LOSSES, "train/lr", "train/kv_weight", "val/loss", "val/ce_loss")
    for config, output in zip(resumed, train(resumed, 2, tmp_path), strict=True):
        assert_same_losses(whole, output, 0.0 if config["run"]["zero_stage"] == 2 else OTHER_ORDER, names)


@pytest.mark.nightly
def test_recording_with_a_warmup_then_offline_gives_the_same_losses(
    world: World, endpoints: Endpoints, tmp_path: Path
) -> None:
    store = str(tmp_path / "store")
    changes: dict[str, Any] = {"align": TO_STUDENT, "loss": {"kv_weight": "auto"}}
    record = world.config("warm-record", endpoints, kv={"mode": "record", "store": store}, **changes)
    nobody = [{"name": "ada"}, {"name": "ben"}]
    offline = world.config("warm-off", endpoints, kv={"mode": "offline", "store": store}, teachers=nobody, **changes)
    (recorded,) = train([record], 2, tmp_path)
    (replayed,) = train([offline], 2, tmp_path)
    assert_same_losses(recorded, replayed, 0.0, (*LOSSES, "val/kv_loss", "train/kv_weight"))


def answered(teacher: TeacherProcess) -> int:
    families = text_string_to_metric_families(teacher.get("/metrics").text)
    return int(sum(s.value for family in families for s in family.samples if s.name == "kvdistill_samples_total"))


def test_a_teacher_that_is_lost_in_the_warmup_is_missed_at_its_end_and_the_run_resumes_from_there(
    world: World, tmp_path: Path
) -> None:
    first = start_teacher(world.teachers["ada"], tmp_path / "first.log").wait_ready()
    align = {"warmup_steps": 30, "calibration_samples": 48}
    config = world.config("lost-warm", {"ada": [first.endpoint]}, align=align, run={"steps": 34})
    output = Path(config["run"]["output_dir"])
    try:
        process, log = start_cli(config, 2, tmp_path)
        lines = output / "metrics.jsonl"
        wait_until(lambda: process.poll() is not None or (lines.is_file() and lines.stat().st_size > 0), 120)
        assert process.poll() is None, log.read_text(encoding="utf-8")[-4000:]
        assert answered(first) == 1, "the self-test of the server"
        first.kill()
        assert process.wait(120) != 0
    finally:
        first.stop()
    text = log.read_text(encoding="utf-8")
    assert "step 30: the warm-up has ended" in text
    assert "teacher 'ada'" in text
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000030"]
    with running_teacher(world.teachers["ada"], tmp_path / "again.log", grpc_port=first.grpc_port):
        process, log = start_cli(config, 2, tmp_path)
        assert process.wait(240) == 0, log.read_text(encoding="utf-8")[-4000:]
    assert "step-00000030" in log.read_text(encoding="utf-8"), "it resumes from the end of the warm-up"
    assert sorted(metrics(output, "train/ce_loss")) == list(range(1, 35))
    assert sorted(metrics(output, "train/kv_loss")) == [31, 32, 33, 34]
    assert not (output / "checkpoints").exists(), "run.save_every is 0"

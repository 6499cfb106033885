"""Tests of calibration with two ranks, and of what it asks real teachers for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file
from torch import multiprocessing

from kvcore.config import parse
from student_trainer.config import TrainConfig
from student_trainer.loop import align_run, ds_engine
from student_trainer.loop import calibrate as calibrate_module
from student_trainer.loop.kv_weight import auto_kv_weight
from student_trainer.loop.training_context import TrainingContext, build_context
from student_trainer.model.distill_model import DistillModel, TrainBatch
from tests.support.servers import TeacherProcess, running_teacher
from tests.support.training import World, make_world
from tests.support.training_parts import RECORDS, distill_model, fetch_for

pytestmark = pytest.mark.slow

SAMPLES = 41


def calibrate_rank(rank: int, world_size: int, directory: str) -> None:
    """Calibrate on every `world_size`-th sample with a look after every 8, and save what was fitted."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/{world_size}", rank=rank, world_size=world_size)
    calibrate_module.FEWEST_BETWEEN = 8
    numbers = range(rank, SAMPLES, world_size)
    records = [RECORDS[number] for number in numbers]
    for name, within in (("settled", 1e9), ("whole", 1e-12)):
        model = distill_model({"ada": 1.0, "ben": 3.0})
        calibrate_module.calibrate(model, records, numbers, fetch_for(model, None), 4, _no_failure, within)
        save_file(model.frozen_state(), f"{directory}/{name}-{rank}-of-{world_size}.safetensors")
    dist.destroy_process_group()


def _no_failure(failure: Exception | None) -> None:
    assert failure is None


def test_two_ranks_fit_what_one_rank_fits_and_stop_together(tmp_path: Path) -> None:
    """Rank 0 has one sample more, and one batch more than rank 1 needs."""
    for world_size in (1, 2):
        multiprocessing.spawn(  # pyright: ignore[reportPrivateImportUsage]
            calibrate_rank, (world_size, str(tmp_path)), nprocs=world_size
        )
    ranks = ("0-of-1", "0-of-2", "1-of-2")
    for name in ("settled", "whole"):
        alone, *both = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in ranks)
        assert both[0].keys() == both[1].keys() == alone.keys()
        for key, tensor in both[0].items():
            torch.testing.assert_close(both[1][key], tensor, rtol=0, atol=0, equal_nan=True, msg=key)
            # The pairs of the control depend on the batches. Two ranks see twice as many samples before each look.
            if name == "whole" and not key.endswith("/shuffled_LK"):
                torch.testing.assert_close(alone[key], tensor, rtol=1e-3, atol=1e-4, equal_nan=True, msg=key)
        rows = int(both[0]["teacher/ada/rows_2"].sum())
        assert (rows < 500) == (name == "settled"), rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def teacher(world: World) -> Iterator[TeacherProcess]:
    with running_teacher(world.teachers["ada"], world.directory / "ada.log") as teacher:
        yield teacher


def answered(teacher: TeacherProcess) -> int:
    """Number of samples that the server has answered."""
    families = text_string_to_metric_families(teacher.get("/metrics").text)
    found = [s.value for family in families for s in family.samples if s.name == "kvdistill_samples_total"]
    return int(sum(found))


def built(world: World, teacher: TeacherProcess, **changes: Any) -> TrainingContext:
    """The parts of a run of one rank with two teachers, calibrated, and closed again."""
    endpoints = {name: [teacher.endpoint] for name in ("ada", "ben")}
    config = world.config("built", endpoints)
    for section, values in ({"loss": {"kv_weight": "auto"}} | changes).items():
        config[section] = {**config[section], **values}
    ds_engine.start(0)
    try:
        context = build_context(parse(config, TrainConfig), 0, 1)
        context.close()
    finally:
        ds_engine.stop()
    return context


@pytest.mark.parametrize(
    ("kept_bytes", "changes", "times"),
    [
        # Passes: fitting and scaling; the KV weight needs 4 micro-batches of 2 of the 48 samples.
        (2**30, {}, 1),
        (2**30, {"kv": {"control": "shuffled"}}, 1),
        (2**30, {"align": {"layer_map": "cka"}}, 1),
        (0, {}, 2 + 4 * 2 / 48),
    ],
)
def test_calibration_asks_a_teacher_once_for_each_sample(
    world: World,
    teacher: TeacherProcess,
    monkeypatch: pytest.MonkeyPatch,
    kept_bytes: int,
    changes: dict[str, Any],
    times: float,
) -> None:
    monkeypatch.setattr(align_run, "KEPT_BYTES", kept_bytes)
    before = answered(teacher)
    context = built(world, teacher, **changes)
    assert answered(teacher) - before == 2 * 48 * times
    assert context.model.kv_weight > 0


def test_the_kv_weight_is_measured_in_the_first_stage_of_a_curriculum(
    world: World, teacher: TeacherProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents: list[int] = []

    def noted(model: DistillModel, batches: list[TrainBatch], *rest: Any) -> float:
        latents.extend(batch.tokens.step_ids_BM.shape[1] for batch in batches)
        return auto_kv_weight(model, batches, *rest)

    monkeypatch.setattr(align_run, "auto_kv_weight", noted)
    changes = {"student": {"latents_per_step": 1}, "run": {"curriculum_epochs": 0.1}}
    context = built(world, teacher, **changes, loss={"kv_weight": "auto", "step_ce_weight": 0.5})
    assert latents == [1] * align_run.KV_WEIGHT_BATCHES
    assert context.model.kv_weight > 0


def test_the_measured_kv_weight_is_limited(
    world: World, teacher: TeacherProcess, caplog: pytest.LogCaptureFixture
) -> None:
    # One micro-batch holds more than all samples.
    run = {"micro_batch": 64, "global_batch": 64}
    measured = built(world, teacher, run=run).model.kv_weight
    with caplog.at_level("INFO"):
        limited = built(world, teacher, run=run, loss={"kv_weight": "auto", "kv_weight_max": measured / 2})
    assert limited.model.kv_weight == measured / 2
    assert f"loss.kv_weight auto: {measured:.4g}, limited by loss.kv_weight_max to {measured / 2:.4g}" in caplog.text
    assert float(limited.model.frozen_state()["kv_weight"]) == measured / 2

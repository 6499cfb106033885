"""Tests of the training loop on one rank, with teachers in memory and an engine without DeepSpeed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.records import Record
from kvcore.errors import TeacherUnavailableError
from student_trainer.config import OptimConfig, TrainConfig
from student_trainer.kv_sources import PendingKV
from student_trainer.kv_sources.kv_batch import STAGES, TeacherSums
from student_trainer.loop import checkpoint, ds_engine
from student_trainer.loop.calibrate import calibrate
from student_trainer.loop.divergence import DivergedError
from student_trainer.loop.metric_accumulator import MetricAccumulator
from student_trainer.loop.sample_order import SampleOrder
from student_trainer.loop.trainer import InterruptedRunError, Trainer, learning_rate
from student_trainer.loop.training_context import TrainingContext
from student_trainer.loop.validation import Validation
from student_trainer.model.distill_model import TrainBatch
from tests.support.plain_engine import PlainEngine
from tests.support.training_parts import (
    LATENTS,
    PASSES,
    RECORDS,
    TOKENIZER,
    collator,
    distill_model,
    one_rank,
    train_batch,
)

TRAIN, VAL = RECORDS[:40], RECORDS[40:45]
STEPS, GLOBAL_BATCH = 4, 4


class MemoryContext(TrainingContext):
    """TrainingContext with teachers in memory.

    Batches are counted from 0. A teacher is unavailable for batch `fails_at`, and its keys are NaN in batch `nan_at`.
    """

    fails_at: int = -1
    nan_at: int = -1
    batches: int = 0

    def batch(
        self, records: Sequence[Record], metrics: MetricAccumulator, pending: Sequence[PendingKV] | None = None
    ) -> TrainBatch:
        type(self).batches += 1
        if type(self).batches - 1 == type(self).fails_at:
            raise TeacherUnavailableError("ada", "no endpoint answers")
        batch = train_batch(self.model, records)
        if type(self).batches - 1 == type(self).nan_at:
            keys = batch.teachers[0].k_BLHMD
            assert keys is not None
            keys.fill_(math.nan)
        return batch


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ds_engine, "Engine", PlainEngine)
    monkeypatch.setattr(ds_engine, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with one_rank():
        yield


def trainer_in(
    output: Path,
    *,
    micro_batch: int = 2,
    fails_at: int = -1,
    nan_at: int = -1,
    optim: dict[str, float] | None = None,
    val: Sequence[Record] = VAL,
    **run: Any,
) -> Trainer:
    settings: dict[str, Any] = {
        "student": {"path": "tiny", "latents": LATENTS, "passes": PASSES},
        "data": {"train": "t.jsonl", "answer_tokens": 2},
        "optim": {"lr": 0.01, **(optim or {})},
        "loss": {"kv_weight": 5.0},
        "run": {
            "output_dir": str(output),
            "steps": STEPS,
            "global_batch": GLOBAL_BATCH,
            "micro_batch": micro_batch,
            "log_every": 1,
            **run,
        },
    }
    config = TrainConfig.model_validate_json(json.dumps(settings))
    model = distill_model({"ada": 1.0, "ben": 1.0}, loss=config.loss)
    resumed = checkpoint.latest(output / "checkpoints")
    if resumed is None:
        calibrate(model, TRAIN, range(40), lambda chosen: train_batch(model, chosen), 40, lambda _: None)
    else:
        model.load_frozen(resumed.frozen())
    MemoryContext.batches, MemoryContext.fails_at, MemoryContext.nan_at = 0, fails_at, nan_at
    order = SampleOrder(config.run, len(TRAIN), 0, 1)
    context = MemoryContext(config, TOKENIZER, collator(), TRAIN, val, {}, model, order, resumed, {"run": "a"})
    return Trainer(config, context, 0, 1)


def logged(output: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_warms_up_linearly_then_follows_its_schedule(schedule: str) -> None:
    optim = OptimConfig.model_validate({"lr": 0.5, "warmup_ratio": 0.2, "schedule": schedule})
    rates = [learning_rate(optim, step, 20) for step in range(21)]
    assert rates[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    middle = {"constant": 0.5, "linear": 0.25, "cosine": 0.25}
    assert rates[12] == pytest.approx(middle[schedule])
    assert rates[20] == pytest.approx(0.5 if schedule == "constant" else 0.0, abs=1e-12)
    assert all(later <= earlier for earlier, later in pairwise(rates[4:]))
    if schedule == "cosine":
        assert rates[8] > 0.5 * (1 - 4 / 16), "slow at first"


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 1), (0.0, 7), (1.0, 1), (1.0, 7)])
def test_warm_up_can_have_no_steps_or_all_steps(warmup: float, steps: int) -> None:
    optim = OptimConfig.model_validate({"lr": 0.5, "warmup_ratio": warmup, "schedule": "linear"})
    rates = [learning_rate(optim, step, steps) for step in range(steps)]
    assert all(0 < rate <= 0.5 for rate in rates)
    assert rates[-1 if warmup else 0] == 0.5


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_losses_do_not_depend_on_the_micro_batch_size(tmp_path: Path, micro_batch: int) -> None:
    trainer_in(tmp_path / "two").train()
    trainer_in(tmp_path / "other", micro_batch=micro_batch).train()
    for name in ("train/loss", "train/kv_loss", "val/loss", "val/task_metrics/accuracy"):
        ours, theirs = logged(tmp_path / "other", name), logged(tmp_path / "two", name)
        assert ours.keys() == theirs.keys()
        assert ours
        for step, value in ours.items():
            assert value == pytest.approx(theirs[step], rel=1e-4), (name, step)


def test_validation_metrics_are_means_over_its_records(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer.train()
    model = trainer.context.model.eval()
    with torch.no_grad():
        losses = [float(model(train_batch(model, [record]))["loss"]) for record in VAL]
    assert logged(tmp_path, "val/loss") == {STEPS: pytest.approx(sum(losses) / len(losses), rel=1e-4)}


@pytest.mark.parametrize("fails_at", [3, 5])
def test_run_that_lost_a_teacher_resumes_from_its_checkpoint(tmp_path: Path, fails_at: int) -> None:
    trainer_in(tmp_path / "whole").train()
    with pytest.raises(TeacherUnavailableError, match="'ada'"):
        trainer_in(tmp_path / "lost", fails_at=fails_at).train()
    found = checkpoint.latest(tmp_path / "lost" / "checkpoints")
    assert found is not None
    assert found.step == fails_at // 2
    trainer_in(tmp_path / "lost").train()
    assert logged(tmp_path / "lost", "train/loss") == logged(tmp_path / "whole", "train/loss")
    assert logged(tmp_path / "lost", "val/loss") == logged(tmp_path / "whole", "val/loss")


@pytest.mark.parametrize("micro_batches_read", [0, 1])
def test_teacher_lost_before_the_first_step_is_reported_by_name(tmp_path: Path, micro_batches_read: int) -> None:
    with pytest.raises(TeacherUnavailableError, match="teacher 'ada': no endpoint answers"):
        trainer_in(tmp_path, fails_at=micro_batches_read).train()
    assert checkpoint.latest(tmp_path / "checkpoints") is None


def test_run_can_be_stopped_before_its_first_step(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer._stop_requested = True
    with pytest.raises(InterruptedRunError, match="told to stop at step 0"):
        trainer.train()


def test_resumed_run_repeats_a_validation_that_lost_a_teacher(tmp_path: Path) -> None:
    trainer_in(tmp_path / "whole").train()
    with pytest.raises(TeacherUnavailableError):
        trainer_in(tmp_path / "lost", fails_at=STEPS * 2 + 1).train()
    trainer_in(tmp_path / "lost").train()
    assert logged(tmp_path / "lost", "val/loss") == logged(tmp_path / "whole", "val/loss")


def test_without_validation_the_last_model_is_saved_as_the_best(tmp_path: Path) -> None:
    summary = trainer_in(tmp_path, val=[]).train()
    assert (summary["best_step"], summary["val_task_metrics"]) == (STEPS, {})
    assert (tmp_path / "best_model" / "latent.safetensors").is_file()
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["steps"] == STEPS


def test_best_model_has_the_highest_accuracy_then_the_lowest_loss(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer.step = 0
    for accuracy, loss, best in [(0.5, 2.0, 1), (0.5, 1.0, 2), (0.4, 0.1, 2), (0.5, 1.0, 2), (0.6, 9.0, 5)]:
        trainer.step += 1
        trainer._keep_best(Validation({"val/task_metrics/accuracy": accuracy, "val/loss": loss}, None))
        assert trainer.best is not None
        assert trainer.best["step"] == best


@pytest.mark.parametrize(("best_by", "best"), [("accuracy", 1), ("loss", 2), ("kv_loss", 3)])
def test_best_by_selects_the_metric_of_the_best_model(tmp_path: Path, best_by: str, best: int) -> None:
    trainer = trainer_in(tmp_path)
    run = trainer.context.config.run.model_copy(update={"best_by": best_by})
    config = trainer.context.config.model_copy(update={"run": run})
    trainer.context = dataclasses.replace(trainer.context, config=config)
    for step, (accuracy, loss, kv_loss) in enumerate([(0.9, 3.0, 2.0), (0.1, 1.0, 3.0), (0.2, 2.0, 1.0)], start=1):
        trainer.step = step
        metrics = {"val/task_metrics/accuracy": accuracy, "val/loss": loss, "val/kv_loss": kv_loss}
        trainer._keep_best(Validation(metrics, None))
    assert trainer.best is not None
    assert trainer.best["step"] == best


def assert_saved_tensors_are_finite(output: Path) -> None:
    """Checks the trained tensors only: calibration leaves NaN where nothing was measured."""
    for path in output.rglob("*.safetensors"):
        if path.name != "frozen.safetensors":
            assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


@pytest.mark.parametrize("nan_at", [4, 5])
def test_run_ended_by_a_nan_loss_resumes_from_the_last_finite_checkpoint(tmp_path: Path, nan_at: int) -> None:
    trainer_in(tmp_path / "whole", save_every=1).train()
    trainer = trainer_in(tmp_path / "bad", nan_at=nan_at, save_every=1)
    with pytest.raises(DivergedError) as raised:
        trainer.train()
    assert str(raised.value).startswith("step 3: the run diverged; not finite: ")
    assert "kv_loss, kv_objective, loss" in str(raised.value)
    assert "step-00000002" in str(raised.value)
    assert "optim.lr" in raised.value.line()
    found = checkpoint.latest(tmp_path / "bad" / "checkpoints")
    assert found is not None
    assert found.step == 2
    assert_saved_tensors_are_finite(tmp_path / "bad")
    assert not (tmp_path / "bad" / "summary.json").exists()
    trainer_in(tmp_path / "bad", save_every=1).train()
    for name in ("train/loss", "val/loss"):
        assert logged(tmp_path / "bad", name) == logged(tmp_path / "whole", name)


def test_nan_loss_in_the_last_micro_batch_ends_the_run_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=f"step {STEPS}: .* loss, gradient norm"):
        trainer_in(tmp_path, nan_at=2 * STEPS - 1, val=[]).train()
    assert not (tmp_path / "best_model").exists()
    assert checkpoint.latest(tmp_path / "checkpoints") is None


def test_infinite_parameters_are_detected_before_they_are_saved(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"step 1: .* not finite: parameters or optimizer moments"):
        trainer_in(tmp_path, optim={"lr": 100.0, "weight_decay": 1e38}, val=[], steps=1).train()
    assert not (tmp_path / "best_model").exists()
    assert checkpoint.latest(tmp_path / "checkpoints") is None


def test_validation_with_a_nan_loss_is_never_the_best(tmp_path: Path) -> None:
    # Batches: two steps of two micro-batches, three of validation, two more steps, then validation again.
    trainer = trainer_in(tmp_path, nan_at=2 * STEPS + 4, eval_every=2, save_every=2)
    with pytest.raises(DivergedError, match=f"step {STEPS}: .* not finite: val/loss;"):
        trainer.train()
    assert trainer.best is not None
    assert trainer.best["step"] == 2
    assert json.loads((tmp_path / "eval_results.json").read_text(encoding="utf-8"))["val"]["step"] == 2
    assert_saved_tensors_are_finite(tmp_path)


def test_metrics_of_logged_steps_add_up_to_the_run_total() -> None:
    total = MetricAccumulator()
    for samples in (4, 8):
        logged_steps = MetricAccumulator()
        logged_steps.add_step(samples, seconds=0.5, align_s=0.125)
        for teacher in ("ada", "ben"):
            seconds = dict.fromkeys(STAGES, 0.0) | {"queue": 0.25}
            logged_steps.add_teacher(teacher, TeacherSums(samples, 1, 100, seconds, raw_bytes=1000, tokens=10))
        total.add(logged_steps)
    assert (total.samples, total.seconds) == (12, 1.0)
    assert total.kv_sums().row()[:5] == [24, 4, 400, 4000, 40]
    assert total.stages() == dict.fromkeys(STAGES, 0.0) | {"queue": 1.0, "align": 0.25}


def test_without_teachers_no_stages_are_logged() -> None:
    metrics = MetricAccumulator()
    metrics.add_step(4, seconds=0.5, align_s=0.0)
    assert metrics.stages() == {}

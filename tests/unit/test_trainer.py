"""Tests of the training loop on one rank, with teachers in memory and an engine without DeepSpeed."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from data.records import Record
from kvcore.errors import ConfigError, KVDistillError, TeacherUnavailableError
from student_trainer.config import TeacherConfig, TrainConfig
from student_trainer.kv_sources.kv_batch import STAGES, TeacherSums
from student_trainer.loop import checkpoint, ds_engine
from student_trainer.loop import trainer as trainer_module
from student_trainer.loop.calibrate import calibrate
from student_trainer.loop.divergence import DivergedError
from student_trainer.loop.finished_run import finished_summary, is_finished
from student_trainer.loop.metric_accumulator import MetricAccumulator
from student_trainer.loop.sample_order import SampleOrder
from student_trainer.loop.trainer import StopRequestedError, Trainer
from student_trainer.loop.training_context import TrainingContext
from student_trainer.loop.validation import Validation
from student_trainer.model.distill_model import TrainBatch
from tests.support.kv_fakes import MemorySource
from tests.support.plain_engine import PlainEngine
from tests.support.training_parts import (
    LATENTS,
    PASSES,
    RECORDS,
    TOKENIZER,
    collator,
    distill_model,
    fetch_for,
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

    def batch(self, records: Sequence[Record], metrics: MetricAccumulator, *_args: Any, **_kwargs: Any) -> TrainBatch:
        type(self).batches += 1
        if type(self).batches - 1 == type(self).fails_at:
            raise TeacherUnavailableError("ada", "no endpoint answers")
        batch = train_batch(self.model, records)
        metrics.add_text(batch.tokens.text_mask_BT)
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
    loss: dict[str, Any] | None = None,
    fuse: dict[str, Any] | None = None,
    val: Sequence[Record] = VAL,
    **run: Any,
) -> Trainer:
    settings: dict[str, Any] = {
        "student": {"path": "tiny", "latents": LATENTS, "passes": PASSES},
        "data": {"train": "t.jsonl", "answer_tokens": 2},
        "optim": {"lr": 0.01, **(optim or {})},
        "loss": {"kv_weight": 5.0, **(loss or {})},
        "fuse": fuse or {},
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
    model = distill_model({"ada": 1.0, "ben": 1.0}, loss=config.loss, fuse=fuse or {})
    resumed = checkpoint.latest(output / "checkpoints")
    if resumed is None:
        calibrate(model, TRAIN, range(40), fetch_for(model), 40, lambda _: None)
    else:
        model.load_frozen(resumed.frozen())
    MemoryContext.batches, MemoryContext.fails_at, MemoryContext.nan_at = 0, fails_at, nan_at
    order = SampleOrder(config.run, len(TRAIN), 0, 1)
    context = MemoryContext(config, TOKENIZER, collator(), TRAIN, val, {}, model, order, resumed, {"run": {"seed": 1}})
    return Trainer(config, context, 0, 1)


def logged(output: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def test_share_of_padding_is_logged_over_all_texts_of_an_interval(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, log_every=2)
    train = [dataclasses.replace(record, prompt=record.prompt * (1 + at % 5)) for at, record in enumerate(TRAIN)]
    trainer.context = dataclasses.replace(trainer.context, train=train)
    trainer.train()
    batches = list(trainer.context.sample_order.micro_batches(0))
    lengths = {index: len(collator().tokens(train[index]).byte_ends) + 1 for batch in batches for index in batch}
    for step, chosen in ((2, batches[:4]), (4, batches[4:])):
        positions = sum(len(batch) * max(lengths[index] for index in batch) for batch in chosen)
        tokens = sum(lengths[index] for batch in chosen for index in batch)
        assert logged(tmp_path, "data/padding_share")[step] == pytest.approx(1 - tokens / positions)
        assert tokens < positions


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_losses_do_not_depend_on_the_micro_batch_size(tmp_path: Path, micro_batch: int) -> None:
    trainer_in(tmp_path / "two").train()
    trainer_in(tmp_path / "other", micro_batch=micro_batch).train()
    for name in ("train/loss", "train/kv_loss", "val/ce_loss", "val/loss", "val/task_metrics/accuracy"):
        ours, theirs = logged(tmp_path / "other", name), logged(tmp_path / "two", name)
        assert ours.keys() == theirs.keys()
        assert ours
        for step, value in ours.items():
            assert value == pytest.approx(theirs[step], rel=1e-4), (name, step)


class CountReads(TorchDispatchMode):
    """Counts how often a number is read out of a tensor of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


def test_micro_batches_read_no_number_from_the_device(tmp_path: Path) -> None:
    """A read waits for all work that was queued before."""
    reads: list[int] = []
    for micro_batch in (1, 4):
        trainer = trainer_in(tmp_path / str(micro_batch), micro_batch=micro_batch, val=[])
        batches = trainer._training_batches()
        with CountReads() as count:
            trainer._one_step(batches)
        reads.append(count.reads)
    assert reads[0] == reads[1]


def test_validation_metrics_are_means_over_its_records(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer.train()
    model = trainer.context.model.eval()
    with torch.no_grad():
        losses = [model(train_batch(model, [record])) for record in VAL]
    for name in ("loss", "ce_loss", "answer_ce", "kv_loss"):
        mean = sum(float(one[name]) for one in losses) / len(losses)
        assert logged(tmp_path, f"val/{name}") == {STEPS: pytest.approx(mean, rel=1e-4)}
    cross_entropy = logged(tmp_path, "val/ce_loss")[STEPS]
    assert logged(tmp_path, "val/perplexity") == {STEPS: pytest.approx(math.exp(cross_entropy))}
    assert cross_entropy < logged(tmp_path, "val/loss")[STEPS], "without the KV loss"


def test_validation_is_logged_with_its_cross_entropy_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "student_trainer.loop.trainer"):
        trainer_in(tmp_path).train()
    (line,) = [message for message in caplog.messages if " validation:" in message]
    number = r"\d+\.\d{4}"
    losses = f"ce_loss {number}, answer_ce {number}, perplexity {number}, kv_loss {number}, loss {number}"
    assert re.fullmatch(rf"step {STEPS}  validation: accuracy \d+\.\d %, {losses}", line)


@pytest.mark.parametrize("fails_at", [3, 5])
def test_run_that_lost_a_teacher_resumes_from_its_checkpoint(tmp_path: Path, fails_at: int) -> None:
    trainer_in(tmp_path / "whole").train()
    with pytest.raises(TeacherUnavailableError, match="'ada'"):
        trainer_in(tmp_path / "lost", fails_at=fails_at).train()
    found = checkpoint.latest(tmp_path / "lost" / "checkpoints")
    assert found is not None
    assert found.step == fails_at // 2
    assert not is_finished(tmp_path / "lost")
    trainer_in(tmp_path / "lost").train()
    assert not (tmp_path / "lost" / "checkpoints").exists(), "removed when the run has ended"
    assert logged(tmp_path / "lost", "train/loss") == logged(tmp_path / "whole", "train/loss")
    assert logged(tmp_path / "lost", "val/loss") == logged(tmp_path / "whole", "val/loss")


@pytest.mark.parametrize(("save_every", "saved"), [(0, []), (3, [3, STEPS]), (STEPS, [STEPS])])
def test_run_is_marked_as_finished_and_keeps_only_the_checkpoints_that_were_asked_for(
    tmp_path: Path, save_every: int, saved: list[int]
) -> None:
    summary = trainer_in(tmp_path, save_every=save_every).train()
    found = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "checkpoints").glob("step-*"))
    assert found == saved
    assert is_finished(tmp_path)
    assert finished_summary(tmp_path, {"run": {"seed": 1}}) == json.loads(json.dumps(summary))
    with pytest.raises(
        ConfigError, match=r"finished\.json belongs to a run with other settings \(run\.seed: 1 then, 2 now\)"
    ):
        finished_summary(tmp_path, {"run": {"seed": 2}})


@pytest.mark.parametrize("micro_batches_read", [0, 1])
def test_teacher_lost_before_the_first_step_is_reported_by_name(tmp_path: Path, micro_batches_read: int) -> None:
    with pytest.raises(TeacherUnavailableError, match="teacher 'ada': no endpoint answers"):
        trainer_in(tmp_path, fails_at=micro_batches_read).train()
    assert checkpoint.latest(tmp_path / "checkpoints") is None


def test_run_can_be_stopped_before_its_first_step(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer._ranks.stop_requested = True
    with pytest.raises(StopRequestedError, match="stopped by a signal at step 0"):
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


def validation(accuracy: float, **losses: float) -> Validation:
    metrics = {f"val/{name}": value for name, value in losses.items()}
    return Validation({"val/task_metrics/accuracy": accuracy, **metrics}, None, [])


def test_best_model_has_the_highest_accuracy_then_the_lowest_cross_entropy(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer.step = 0
    for accuracy, ce_loss, best in [(0.5, 2.0, 1), (0.5, 1.0, 2), (0.4, 0.1, 2), (0.5, 1.0, 2), (0.6, 9.0, 5)]:
        trainer.step += 1
        # The total loss falls and rises the other way round.
        trainer._keep_best(validation(accuracy, ce_loss=ce_loss, loss=10.0 - ce_loss))
        assert trainer.best is not None
        assert trainer.best["step"] == best


def choosing(output: Path, best_by: str) -> Trainer:
    """A trainer that chooses the best model by a metric."""
    trainer = trainer_in(output)
    run = trainer.context.config.run.model_copy(update={"best_by": best_by})
    config = trainer.context.config.model_copy(update={"run": run})
    trainer.context = dataclasses.replace(trainer.context, config=config)
    return trainer


@pytest.mark.parametrize(("best_by", "best"), [("accuracy", 1), ("loss", 2), ("kv_loss", 3), ("ce_loss", 4)])
def test_best_by_selects_the_metric_of_the_best_model(tmp_path: Path, best_by: str, best: int) -> None:
    trainer = choosing(tmp_path, best_by)
    by_step = ((0.9, 3.0, 2.0, 3.0), (0.1, 1.0, 3.0, 2.0), (0.2, 2.0, 1.0, 4.0), (0.3, 3.0, 2.0, 1.0))
    for step, (accuracy, loss, kv_loss, ce_loss) in enumerate(by_step, start=1):
        trainer.step = step
        trainer._keep_best(validation(accuracy, loss=loss, kv_loss=kv_loss, ce_loss=ce_loss))
    assert trainer.best is not None
    assert trainer.best["step"] == best


def test_best_by_kv_loss_needs_a_validation_sample_with_kv(tmp_path: Path) -> None:
    trainer = choosing(tmp_path, "kv_loss")
    with pytest.raises(KVDistillError, match="no validation sample has K/V"):
        trainer._keep_best(validation(0.5, loss=1.0, ce_loss=1.0))
    assert not (tmp_path / "best_model").exists()


@pytest.mark.parametrize(("decay", "weights"), [("none", [5.0, 5.0, 5.0, 5.0]), ("linear", [5.0, 3.75, 2.5, 1.25])])
def test_kv_weight_follows_its_decay_also_after_a_resume(tmp_path: Path, decay: str, weights: list[float]) -> None:
    loss = {"kv_decay": decay, "reasoning_ce_weight": 0.0}
    trainer_in(tmp_path / "whole", loss=loss, eval_every=2).train()
    # Batches: two steps of two micro-batches, then three of validation.
    with pytest.raises(TeacherUnavailableError):
        trainer_in(tmp_path / "lost", fails_at=4, loss=loss, eval_every=2).train()
    resumed = trainer_in(tmp_path / "lost", loss=loss, eval_every=2)
    assert (resumed.step, resumed.evaluated) == (2, 0)
    resumed.train()
    for output in (tmp_path / "whole", tmp_path / "lost"):
        total, ce, kv = (logged(output, f"train/{name}") for name in ("loss", "ce_loss", "kv_objective"))
        found = {step: (total[step] - ce[step]) / kv[step] for step in total}
        assert found == pytest.approx(dict(enumerate(weights, start=1)), rel=1e-4)
    assert logged(tmp_path / "lost", "val/loss") == logged(tmp_path / "whole", "val/loss")


def after_warmup(output: Path, start: Path) -> Trainer:
    """A trainer in `output` whose warm-up of 2 steps ended with the checkpoint `start`."""
    trainer = trainer_in(output, save_every=1, keep_checkpoints=9)
    align = trainer.config.align.model_copy(update={"warmup_steps": 2})
    teachers = tuple(TeacherConfig(name=name) for name in ("ada", "ben"))
    config = trainer.config.model_copy(update={"align": align, "teachers": teachers})
    resumed = trainer.context.resumed or checkpoint.at(start.parent, int(start.name.removeprefix("step-")))
    sources = {teacher.name: MemorySource() for teacher in teachers}
    context = dataclasses.replace(trainer.context, config=config, sources=sources, resumed=resumed)
    return Trainer(config, context, 0, 1)


def test_run_resumes_exactly_after_the_optimiser_began_anew_at_the_end_of_the_warmup(tmp_path: Path) -> None:
    trainer_in(tmp_path / "warm", save_every=1, keep_checkpoints=9).train()
    start = tmp_path / "warm" / "checkpoints" / "step-00000002"
    after_warmup(tmp_path / "whole", start).train()
    resumed = tmp_path / "resumed" / "checkpoints" / "step-00000003"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / resumed.name, resumed)
    trainer = after_warmup(tmp_path / "resumed", start)
    assert trainer.step == 3
    trainer.train()
    saved = "checkpoints/step-00000004/weights.safetensors"
    ours, theirs = (load_file(tmp_path / name / saved) for name in ("resumed", "whole"))
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items())


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


def test_tf32_is_set_for_each_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def stop(config: TrainConfig, *_: object) -> None:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        raise TeacherUnavailableError("ada", "stop here")

    monkeypatch.setattr(trainer_module, "build_context", stop)
    monkeypatch.setattr(ds_engine, "start", lambda _seed: (0, 1))
    for allowed in (True, False):
        tree = {"student": {"path": "s"}, "data": {"train": "t"}, "run": {"output_dir": str(tmp_path), "steps": 1}}
        tree["run"] |= {"allow_tf32": allowed}
        with pytest.raises(TeacherUnavailableError):
            trainer_module.run(TrainConfig.model_validate_json(json.dumps(tree)))
    assert seen == [True, False]


def test_similarity_counts_after_the_warm_up_also_in_a_resumed_run(tmp_path: Path) -> None:
    fuse = {"kind": "similarity", "warmup_ratio": 0.5}
    trainer = trainer_in(tmp_path, fuse=fuse, save_every=3)
    trainer.train()
    weights = logged(tmp_path, "routing/weights_mean/ada")
    assert (weights[1], weights[2]) == (0.5, 0.5)
    assert abs(weights[3] - 0.5) > 1e-4
    resumed = trainer_in(tmp_path, fuse=fuse)
    assert resumed.context.model.fusion is not None
    assert resumed.context.model.fusion.compares

"""The training loop. There is one process per rank, and every rank runs the same collectives whatever a teacher does.

From a record to its loss, in eight steps:

1. `SampleOrder` picks the indices of a micro-batch from seed and step. Each `data.records.Record` becomes a
   `kvcore.types.Sample`: an id, a text and its spans.
2. `TrainingContext.submit` requests the samples from every teacher's `KVSource`, `kv.prefetch` batches ahead.
3. A source answers each sample with `EncodedSampleKV` (from a teacher server or the store), or with `MissingKV`.
4. `TrainingContext.batch` decodes them: `decode_and_pad` makes one padded `BatchKV` per teacher. The collator makes
   the student's tokens, a `StudentBatch`. Both form the `TrainBatch`.
5. `DistillModel` runs the student. `LatentStudent` returns logits for the cross-entropy, and the student's own K/V.
6. Each teacher's `Aligner` maps its `BatchKV` to the student's geometry: an `AlignedTeacher`. `TimeAligner` resamples
   its slots to the latents if `align.time` asks for it.
7. `Fusion` weighs the teachers and averages them into one target. With `align.direction: to_teacher` each teacher stays
   a target of its own.
8. `kv_distance` compares the student's K/V with the target. `DistillModel.forward` adds the weighted losses up, and
   `Engine.micro_step` does backward and optimiser step.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from data.records import Record
from fuse.routing import CollapseDetector
from kvcore.config import load_config
from kvcore.errors import KVDistillError
from kvcore.files import write_json
from kvcore.monitoring import tracing
from student_trainer.config import BEST_MODEL, OptimConfig, TrainConfig
from student_trainer.kv_sources import PendingKV
from student_trainer.kv_sources.kv_batch import TeacherSums
from student_trainer.loop import checkpoint, ds_engine
from student_trainer.loop.divergence import GRADIENT_NORM, STATE, DivergedError, FiniteCheck, not_finite
from student_trainer.loop.metric_accumulator import MetricAccumulator
from student_trainer.loop.rank_failures import shared_failure
from student_trainer.loop.stages import run_stages
from student_trainer.loop.training_context import TrainingContext, build_context
from student_trainer.loop.validation import Validation, validate
from student_trainer.model.distill_model import TrainBatch
from student_trainer.model.export import save_model
from student_trainer.monitoring.monitor import monitored
from student_trainer.monitoring.run_state import RunState
from student_trainer.monitoring.tracking import Tracker, peak_memory_mb

logger = logging.getLogger(__name__)

# A rank's status. Where ranks differ, the highest holds for all.
_OK, _STOP, _FAILED, _DIVERGED = range(4)


class InterruptedRunError(KVDistillError):
    """The run was asked to stop. It can resume from its checkpoint."""


def main(config_path: Path, overrides: list[str]) -> None:
    """Runs `kvdistill train` on this rank."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    try:
        train(load_config(config_path, overrides, TrainConfig))
    finally:
        ds_engine.stop()


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs a configuration, with all its stages, on this rank. Returns the summary of the last stage.

    The process group stays open for further runs of this process; `ds_engine.stop` ends it.
    """
    stop_tracing = tracing.start("kvdistill-trainer", f"rank{os.environ.get('RANK', '0')}")
    try:
        return run_stages(config, run)[-1] if config.stages else run(config)
    finally:
        stop_tracing()


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains from the start or from the newest checkpoint to the end, and returns the content of `summary.json`."""
    rank, world_size = ds_engine.start(config.run.seed)
    with monitored(config, enabled=rank == 0) as state, ExitStack() as undo:
        context = build_context(config, rank, world_size)
        undo.callback(context.close)
        trainer = Trainer(config, context, rank, world_size, state)
        undo.callback(trainer.engine.close)
        return trainer.train()


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """The learning rate after `step` of `steps` steps: linear warm-up, then the schedule down to 0."""
    warmup = round(optim.warmup_ratio * steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    done = (step - warmup) / max(1, steps - warmup)
    return optim.lr * (1 - done if optim.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


class Trainer:
    """Trains one configuration on one rank."""

    def __init__(
        self, config: TrainConfig, context: TrainingContext, rank: int, world_size: int, state: RunState | None = None
    ) -> None:
        self.config, self.context, self.rank, self.world_size = config, context, rank, world_size
        self.state = RunState() if state is None else state
        self.state.connected(context.sources)
        self.out = config.run.output_dir
        self._checkpoints = self.out / "checkpoints"
        self.device = ds_engine.device()
        if context.resumed is not None:
            context.resumed.load_weights(context.model)
        self.engine = ds_engine.Engine(context.model, config, context.sample_order.accumulation)
        self.best: dict[str, float] | None = None
        self.step = self.evaluated = 0
        self.metrics, self.run_metrics = MetricAccumulator(), MetricAccumulator()
        self.collapse = CollapseDetector(list(context.model.weights), config.fuse.collapse_at)
        self._stop_requested = False
        self._finite = FiniteCheck()
        if context.resumed is not None:
            context.resumed.restore(self.engine)
            self.step, self.best = context.resumed.step, context.resumed.state["best"]
            self.evaluated = context.resumed.state["evaluated"]
        self._set_epoch(max(self.step - 1, 0))

    def train(self) -> dict[str, Any]:
        """Trains to the end and returns the summary. A finished run returns the summary that it has."""
        summary = self.out / "summary.json"
        if self.step == self.context.sample_order.steps == self.evaluated and summary.is_file():
            if self.rank == 0:
                logger.info("all %d steps are done; choose another run.output_dir, or run.resume=never", self.step)
            return json.loads(summary.read_text(encoding="utf-8"))
        before = {number: signal.signal(number, self._request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        tracker = Tracker(
            self.out, self.context.sample_order.steps, enabled=self.rank == 0, first_step=self.step, state=self.state
        )
        started = time.monotonic()
        try:
            with self.state.during("training"):
                self._loop(tracker)
                return self._finish(time.monotonic() - started)
        finally:
            tracker.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _request_stop(self, number: int, _frame: FrameType | None) -> None:
        """Ends the run at the next micro-batch; a second signal ends the process at once."""
        self._stop_requested = True
        signal.signal(number, signal.SIG_DFL)

    def _loop(self, tracker: Tracker) -> None:
        if self.step > self.evaluated and self._due(self.config.run.eval_every):
            self._evaluate(tracker)  # The run ended during this validation.
        batches = self._submitted(self.context.sample_order.micro_batches(self.step))
        while self.step < self.context.sample_order.steps:
            self._one_step(batches)
            if self.step % self.config.run.log_every == 0 or self.step == self.context.sample_order.steps:
                self._log(tracker)
            if self._due(self.config.run.eval_every):
                self._evaluate(tracker)
            if self._due(self.config.run.save_every):
                self._save()

    def _due(self, every: int) -> bool:
        return self.step == self.context.sample_order.steps or (every > 0 and self.step % every == 0)

    def _submitted(self, micro_batches: Iterator[list[int]]) -> Iterator[tuple[list[Record], list[PendingKV]]]:
        """Each micro-batch's records and their requests, submitted `kv.prefetch` micro-batches before they are used."""
        ahead: deque[tuple[list[Record], list[PendingKV]]] = deque()
        for indices in micro_batches:
            records = [self.context.train[index] for index in indices]
            ahead.append((records, self.context.submit(records)))
            if len(ahead) > self.config.kv.prefetch:
                yield ahead.popleft()
        yield from ahead

    def _one_step(self, batches: Iterator[tuple[list[Record], list[PendingKV]]]) -> None:
        began = time.monotonic()
        torch.manual_seed(hash((self.config.run.seed, self.step, self.rank)) % 2**63)
        self.engine.set_lr(learning_rate(self.config.optim, self.step, self.context.sample_order.steps))
        self.engine.module.train()
        self._set_epoch(self.step)
        for _ in range(self.context.sample_order.accumulation):
            batch = self._fetch(*next(batches), self.metrics)
            losses = {name: float(value.detach()) for name, value in self.engine.micro_step(batch).items()}
            self._finite.note(self.step + 1, losses)
            self.metrics.add_losses(losses)
        self.step += 1
        norm = self.engine.gradient_norm()
        if norm is not None:
            self._finite.note(self.step, {GRADIENT_NORM: norm})
        self.metrics.add_step(
            self.config.run.global_batch, time.monotonic() - began, self.context.model.take_align_seconds()
        )
        self.state.stepped(self.step, self.config.run.global_batch)

    def _set_epoch(self, step: int) -> None:
        if self.context.model.fusion is not None:
            self.context.model.fusion.set_epoch(self.context.sample_order.epoch(step))

    def _fetch(
        self, records: Sequence[Record], pending: Sequence[PendingKV] | None, metrics: MetricAccumulator
    ) -> TrainBatch:
        """One micro-batch with its teachers' K/V. If any rank cannot continue, all ranks save a checkpoint and stop."""
        batch: TrainBatch | None = None
        with shared_failure(self._stop_if_any_rank_must):
            batch = self.context.batch(records, metrics, pending)
        assert batch is not None
        return batch

    def _stop_if_any_rank_must(self, failure: KVDistillError | None) -> None:
        status = self._agree(failure)
        if status == _OK:
            return
        if self.step > 0:  # Before the first step the optimiser has no state to save.
            path = self._save()
            if self.rank == 0:
                logger.warning("checkpoint saved: %s; the same command resumes from step %d", path, self.step)
        reason = "another rank failed" if status == _FAILED else "told to stop"
        raise failure or InterruptedRunError(f"{reason} at step {self.step}")

    def _agree(self, failure: KVDistillError | None) -> int:
        """The highest status of any rank, in one small collective: OK, stop or failed.

        Raises:
            DivergedError: on every rank, if any rank saw a value that is not finite. Nothing may be saved then.
        """
        own = _DIVERGED if self._finite.failed else _FAILED if failure else _STOP if self._stop_requested else _OK
        status = torch.tensor(own, device=self.device)
        dist.all_reduce(status, op=dist.ReduceOp.MAX)
        if int(status) == _DIVERGED:
            raise DivergedError(*self._finite.agreed(self.device), self._checkpoints)
        return int(status)

    def _log(self, tracker: Tracker) -> None:
        metrics, self.metrics = self.metrics, MetricAccumulator()
        self.run_metrics.add(metrics)
        names, teachers = sorted(metrics.losses), list(self.context.sources)
        loss_sums = self._sum_over_ranks([metrics.losses[name] for name in names])
        by_teacher = {
            name: TeacherSums.from_row(self._sum_over_ranks(row))
            for name, row in zip(teachers, metrics.teacher_rows(teachers), strict=True)
        }
        self.state.account(metrics.seconds, metrics.stages(), by_teacher)
        per_loss = metrics.micro_batches * self.world_size
        figures = {
            (name if "/" in name else f"train/{name}"): value / per_loss
            for name, value in zip(names, loss_sums, strict=True)
        }
        figures["train/lr"] = learning_rate(self.config.optim, self.step - 1, self.context.sample_order.steps)
        figures["train/epoch"] = self.context.sample_order.epoch(self.step)
        figures["train/samples_per_second"] = metrics.samples / metrics.seconds
        if teachers:
            figures |= metrics.figures(by_teacher, self.world_size)
            for name, source in self.context.sources.items():
                health = source.health()
                figures[f"kv/switches/{name}"] = health.switches if health else 0
                figures[f"kv/retries/{name}"] = health.retries if health else 0
            self._add_routing(figures)
        tracker.log(self.step, figures)
        tracker.progress(self.step, figures)

    def _sum_over_ranks(self, row: Sequence[float]) -> list[float]:
        sums = torch.tensor(row, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def _add_routing(self, figures: dict[str, float]) -> None:
        """Adds the routing metrics, and warns if the router uses almost only one teacher."""
        weights = {name: f"routing/weights_mean/{name}" for name in self.context.model.weights}
        if self.config.fuse.kind == "fixed":
            figures |= {weights[name]: weight for name, weight in self.context.model.weights.items()}
            return
        assert self.context.model.fusion is not None
        figures["routing/temperature"] = self.context.model.fusion.temperature
        warning = self.collapse.check([figures[name] for name in weights.values()])
        if warning and self.rank == 0:
            logger.warning("step %d: %s", self.step, warning)

    def _evaluate(self, tracker: Tracker) -> None:
        if not self.context.val:
            self.evaluated = self.step
            return
        self.engine.module.eval()
        with self.state.during("validating"):
            found = validate(
                self.engine.module,
                self.context,
                lambda records: self._fetch(records, None, MetricAccumulator()),
                self.device,
            )
        tracker.log(self.step, {name: value for name, value in found.metrics.items() if name.startswith("val/")})
        judged = ["val/loss"] + [f"val/{self.config.run.best_by}"] * (self.config.run.best_by != "accuracy")
        if bad := not_finite({name: found.metrics[name] for name in judged}):
            raise DivergedError(self.step, sorted(bad), self._checkpoints)
        if self.rank == 0:
            shown = ", ".join(
                f"{name} {found.metrics[name]:.4f}" for name in ("val/loss", "val/kv_loss") if name in found.metrics
            )
            accuracy = 100 * found.metrics["val/task_metrics/accuracy"]
            logger.info("step %d  validation: accuracy %.1f %%, %s", self.step, accuracy, shown)
        self._keep_best(found)
        self.evaluated = self.step

    def _keep_best(self, found: Validation) -> None:
        current = {name: value for name, value in found.metrics.items() if name.startswith("val/")}
        current["step"] = float(self.step)

        if self.best is None or self._quality(current) > self._quality(self.best):
            self._check_state()
            self.best = current
            save_model(self.engine, self.context, self.out / BEST_MODEL)
            if self.rank == 0:
                write_json(self.out / "eval_results.json", found.results(self.context, self.step))

    def _quality(self, metrics: dict[str, float]) -> tuple[float, float]:
        """Higher is better, by `run.best_by`, then by the loss."""
        best_by = self.context.config.run.best_by
        first = metrics["val/task_metrics/accuracy"] if best_by == "accuracy" else -metrics[f"val/{best_by}"]
        return first, -metrics["val/loss"]

    def _flush(self) -> None:
        """Puts recorded K/V on disk, and checks that the model may be saved."""
        with shared_failure(self._check_state):
            self.context.flush()

    def _check_state(self, failure: KVDistillError | None = None) -> None:
        """Raises on all ranks if one has a failure or holds numbers that are not finite. Called before every save."""
        if not self._finite.failed:
            self._finite.note(self.step, {STATE: 0.0 if self.engine.is_finite() else math.nan})
        if self._agree(failure) == _FAILED:
            raise failure or KVDistillError("another rank failed; its message says why")

    def _save(self) -> Path:
        self._flush()
        state = {
            "step": self.step,
            "evaluated": self.evaluated,
            "best": self.best,
            "identity": self.context.identity,
        }
        with self.state.during("saving"):
            return checkpoint.save(
                self._checkpoints,
                self.engine,
                self.context.model.frozen_state(),
                state,
                self.config.run.keep_checkpoints,
            )

    def _finish(self, seconds: float) -> dict[str, Any]:
        self._flush()
        if not self.context.val:
            save_model(self.engine, self.context, self.out / BEST_MODEL)
        peaks = self._sum_over_ranks([peak_memory_mb() * (rank == self.rank) for rank in range(self.world_size)])
        seconds_trained, samples = max(self.run_metrics.seconds, 1e-9), self.run_metrics.samples
        kv = TeacherSums.from_row(self._sum_over_ranks(self.run_metrics.kv_sums().row()))
        received, teachers = max(kv.samples, 1.0), len(self.context.sources)
        best = self.best or {}
        summary = {
            "steps": self.step,
            "best_step": int(best["step"]) if best else self.step,
            "val_task_metrics": {"accuracy": best["val/task_metrics/accuracy"]} if best else {},
            "val_kv_loss": best.get("val/kv_loss"),
            "stall_fraction": kv.seconds["stall"] / self.world_size / seconds_trained,
            "samples_per_second": samples / seconds_trained,
            "bytes_per_sample": kv.encoded_bytes / received * teachers,
            "raw_bf16_bytes_per_sample": kv.raw_bytes / received * teachers,
            "teacher_tokens_per_second": kv.tokens / seconds_trained,
            "peak_memory_mb": {f"rank{index}": peak for index, peak in enumerate(peaks)},
            "alignment": self.context.model.report(),
            "seconds": seconds,
        }
        if self.rank == 0:
            write_json(self.out / "summary.json", summary)
        dist.barrier()
        return summary

"""The training loop. There is one process per rank, and every rank runs the same collectives even if a teacher fails.

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

import logging
import math
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
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
from student_trainer.config import BEST_MODEL, TrainConfig
from student_trainer.kv_sources.kv_batch import TeacherSums
from student_trainer.loop import checkpoint, ds_engine
from student_trainer.loop.agreement import FAILED, OK, STOP, Agreement
from student_trainer.loop.align_run import recalibrate
from student_trainer.loop.divergence import GRADIENT_NORM, STATE, DivergedError, not_finite
from student_trainer.loop.finished_run import finish, finished_summary
from student_trainer.loop.memory_figures import memory_figures
from student_trainer.loop.metric_accumulator import MetricAccumulator, StepLosses
from student_trainer.loop.rank_failures import shared_failure
from student_trainer.loop.run_summary import run_summary
from student_trainer.loop.schedules import kv_weight_share, learning_rate
from student_trainer.loop.stages import run_stages
from student_trainer.loop.teacher_figures import teacher_figures, warn_of_collapse
from student_trainer.loop.training_context import TrainingContext, build_context, end_warmup
from student_trainer.loop.validation import LOSSES, Validation, judged_by, quality, validate
from student_trainer.model.distill_model import TrainBatch
from student_trainer.model.export import save_model
from student_trainer.monitoring.last_line import last_line
from student_trainer.monitoring.log_file import kept_log
from student_trainer.monitoring.monitor import monitored
from student_trainer.monitoring.run_state import RunState
from student_trainer.monitoring.trackers import ExperimentTracker, open_trackers
from student_trainer.monitoring.tracking import Tracker

logger = logging.getLogger(__name__)


class InterruptedRunError(KVDistillError):
    """The run ended early. It can resume from its checkpoint."""


class StopRequestedError(InterruptedRunError):
    """A signal asked the run to stop."""

    exit_status = 128 + signal.SIGTERM


def main(config_path: Path, overrides: list[str]) -> None:
    """Runs `kvdistill train` on this rank."""
    first = os.environ.get("RANK", "0") == "0"
    level = logging.INFO if first else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    config = load_config(config_path, overrides, TrainConfig)
    with kept_log(config.run.output_dir / "logs") if first else nullcontext():
        try:
            summary = train(config)
        finally:
            ds_engine.stop()
        if first:
            logger.info("%s", last_line(config, summary))


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
    """Trains from the start or from the newest checkpoint to the end, and returns the content of `summary.json`.

    A finished run returns the summary that it has.
    """
    rank, world_size = ds_engine.start(config.run.seed)
    torch.backends.cuda.matmul.allow_tf32 = config.run.allow_tf32
    with monitored(config, enabled=rank == 0) as state, ExitStack() as undo:
        context = build_context(config, rank, world_size)
        undo.callback(context.close)
        if context.finished:
            if rank == 0:
                steps = context.sample_order.steps
                logger.info(
                    "all %d steps are done; to train again, choose another run.output_dir, or set run.resume=never",
                    steps,
                )
            return finished_summary(config.run.output_dir, context.identity)
        trainer = Trainer(config, context, rank, world_size, state)
        undo.callback(lambda: trainer.context.close())  # Other sources, if teachers were sent maps after the warm-up.
        undo.callback(trainer.close)
        return trainer.train()


class Trainer:
    """Trains one configuration on one rank."""

    def __init__(
        self, config: TrainConfig, context: TrainingContext, rank: int, world_size: int, state: RunState | None = None
    ) -> None:
        self.config, self.context, self.rank, self.world_size = config, context, rank, world_size
        self.state = RunState() if state is None else state
        self.state.connected(context.connected)
        self.out = config.run.output_dir
        self._checkpoints = self.out / "checkpoints"
        self.device = ds_engine.device()
        self.best: dict[str, float] | None = None
        self.step = self.evaluated = 0
        self._began_at: int | None = None  # The step before which the optimiser began without moments.
        self.metrics, self.run_metrics = MetricAccumulator(), MetricAccumulator()
        self.collapse = CollapseDetector([teacher.name for teacher in config.teachers])
        self._ranks = Agreement(self.device, self._checkpoints)
        if context.resumed is not None:
            self.step, self.best = context.resumed.step, context.resumed.state["best"]
            self.evaluated = context.resumed.state["evaluated"]
        self._start_engine()

    def _start_engine(self) -> None:
        """Creates the engine for the context's model, with the state of the checkpoint that the run resumes from."""
        context, resumed = self.context, self.context.resumed
        if resumed is not None:
            resumed.load_weights(context.model)
        self.engine = ds_engine.Engine(context.model, self.config, context.sample_order.accumulation)
        self._open = True
        # The moments of the warm-up are those of another loss.
        if resumed is not None and resumed.step > context.first_step:
            resumed.restore(self.engine, context.first_step)
        else:
            self._began_at = self.step
        self._set_schedules(max(self.step - 1, context.first_step))

    def close(self) -> None:
        """Frees the engine. Safe to call twice."""
        if self._open:
            self._open = False
            self.engine.close()

    def train(self) -> dict[str, Any]:
        """Trains to the end and returns the summary."""
        before = {number: signal.signal(number, self._request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        tracker = self._tracker()
        started = time.monotonic()
        try:
            with self.state.during("training"):
                self._loop(tracker)
                return self._finish(time.monotonic() - started)
        finally:
            tracker.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _tracker(self) -> Tracker:
        trackers: dict[str, ExperimentTracker] = {}
        with shared_failure():
            if self.rank == 0:
                trackers = open_trackers(self.config, self.step)
        steps, enabled = self.context.sample_order.steps, self.rank == 0
        return Tracker(self.out, steps, enabled=enabled, first_step=self.step, state=self.state, trackers=trackers)

    def _request_stop(self, number: int, _frame: FrameType | None) -> None:
        """Ends the run at the next micro-batch; a second signal ends the process at once."""
        self._ranks.stop_requested = True
        signal.signal(number, signal.SIG_DFL)

    def _loop(self, tracker: Tracker) -> None:
        if self.step > self.evaluated and self._due(self.config.run.eval_every):
            self._evaluate(tracker)  # The run ended during this validation.
        if self.context.warming_up and self.rank == 0:
            logger.info("the first %d steps train on cross-entropy alone", self.config.align.warmup_steps)
        batches = self._training_batches()
        while self.step < self.context.sample_order.steps:
            if self.context.warming_up and self.step >= self.config.align.warmup_steps:
                self._end_warmup()
                batches = self._training_batches()
            elif self._due_recalibration():
                with self.state.during("starting"):
                    recalibrate(self.context, self._for_calibration, self.step)
            self._one_step(batches)
            if self._due(self.config.run.log_every) or self._losses_change():
                self._log(tracker)
            if self._due(self.config.run.eval_every):
                self._evaluate(tracker)
            if self.config.run.save_every and self._due(self.config.run.save_every):
                self._save()

    def _due(self, every: int) -> bool:
        return self.step == self.context.sample_order.steps or (every > 0 and self.step % every == 0)

    def _losses_change(self) -> bool:
        """Whether the next step has other losses than the last one, so that their means must be logged apart."""
        last, following = (self.context.latent_steps(step) for step in (self.step - 1, self.step))
        return self.step == self.config.align.warmup_steps or last != following

    def _training_batches(self) -> Iterator[TrainBatch]:
        """The batches from the current step on."""
        train, chosen = self.context.train, self.context.sample_order.micro_batches(self.step)
        return self._fetched(self.context, ([train[index] for index in indices] for indices in chosen), control=True)

    def _end_warmup(self) -> None:
        """Saves the warmed student and continues like a run that resumes from it: with the KV loss, without moments."""
        if self.rank == 0:
            logger.info("step %d: the warm-up has ended; fitting alignments", self.step)
        self._save(warming_up=False)
        self._began_at = self.step
        self.close()
        with shared_failure():
            saved = checkpoint.at(self._checkpoints, self.step)
        with self.state.during("starting"):
            self.context = end_warmup(self.context, saved, self._for_calibration)
            self._start_engine()
        self.state.connected(self.context.connected)

    def _due_recalibration(self) -> bool:
        every, done = self.config.align.recalibrate_every, self.step - self.context.first_step
        return every > 0 and bool(self.context.sources) and done > 0 and done % every == 0

    def _for_calibration(self, context: TrainingContext, batches: Iterable[Sequence[Record]]) -> Iterator[TrainBatch]:
        return self._fetched(context, batches, control=False)

    def _one_step(self, batches: Iterator[TrainBatch]) -> None:
        began = time.monotonic()
        torch.manual_seed(hash((self.config.run.seed, self.step, self.rank)) % 2**63)
        self.engine.module.train()
        self._set_schedules(self.step)
        accumulation, sums = self.context.sample_order.accumulation, StepLosses()
        for _ in range(accumulation):
            sums.add(self.engine.micro_step(next(batches)))
        self.step += 1
        if self.context.lost is not None:
            self.context.lost.step_done()
        losses = sums.read()
        self._ranks.finite.note(self.step, losses)
        self.metrics.add_losses(losses, accumulation)
        norm = self.engine.gradient_norm()
        if norm is not None:
            self._ranks.finite.note(self.step, {GRADIENT_NORM: norm})
        self.metrics.add_step(
            self.config.run.global_batch, time.monotonic() - began, self.context.model.take_align_seconds()
        )
        self.state.stepped(self.step, self.config.run.global_batch)

    def _set_schedules(self, step: int) -> None:
        """Sets the learning rate, the KV loss's weight and the router's temperature of the step after `step` steps."""
        model, order = self.context.model, self.context.sample_order
        first = self.context.first_step
        self.engine.set_lr(learning_rate(self.config.optim, step, order.steps, first))
        if model.frozen_state():
            share = kv_weight_share(self.config.loss, step, order.steps, first)
            model.kv_weight = share * float(model.frozen_state()["kv_weight"])
        if model.fusion is not None:
            model.fusion.set_progress(order.epoch(step), step / order.steps)

    def _fetched(
        self, context: TrainingContext, batches: Iterable[Sequence[Record]], *, control: bool
    ) -> Iterator[TrainBatch]:
        """The batches with their teachers' K/V, requested ahead. If a rank cannot continue, all save and stop.

        Args:
            context: whose sources are asked.
            batches: the records.
            control: under `kv.control`, and measured.
        """
        for records, pending in context.submitted(batches, control=control):
            batch: TrainBatch | None = None
            with shared_failure(self._stop_if_any_rank_must):
                # Nothing is collated ahead, so `self.step` is the step that uses the batch.
                metrics, stage = (
                    (self.metrics, context.latent_steps(self.step)) if control else (MetricAccumulator(), None)
                )
                batch = context.batch(records, metrics, pending, stage)
            assert batch is not None
            yield batch

    def _stop_if_any_rank_must(self, failure: KVDistillError | None) -> None:
        status = self._ranks.reach(failure)
        if status == OK:
            return
        if self.step != self._began_at:  # Before its first step the optimiser has no state to save.
            path = self._save()
            if self.rank == 0:
                logger.warning("checkpoint saved: %s; the same command resumes from step %d", path, self.step)
        if status == STOP:
            raise StopRequestedError(f"stopped by a signal at step {self.step}")
        raise failure or InterruptedRunError(f"another rank failed at step {self.step}")

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
        order, first = self.context.sample_order, self.context.first_step
        figures["train/lr"] = learning_rate(self.config.optim, self.step - 1, order.steps, first)
        figures["train/epoch"] = self.context.sample_order.epoch(self.step)
        if (stage := self.context.latent_steps(self.step - 1)) is not None:
            figures["curriculum/stage"] = stage
        figures["train/samples_per_second"] = metrics.samples / metrics.seconds
        figures |= memory_figures()
        padding, positions = self._sum_over_ranks([metrics.padding, metrics.positions])
        figures["data/padding_share"] = padding / max(1.0, positions)
        if self.config.self_teacher:
            figures["train/kv_weight"] = self.context.model.kv_weight
        if teachers:
            figures |= metrics.figures(by_teacher, self.world_size)
            figures |= teacher_figures(self.context)
            warn_of_collapse(self.collapse, self.context, figures, self.step)
        tracker.log(self.step, figures)
        tracker.progress(self.step, figures)

    def _sum_over_ranks(self, row: Sequence[float]) -> list[float]:
        sums = torch.tensor(row, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def _evaluate(self, tracker: Tracker) -> None:
        if not self.context.val:
            self.evaluated = self.step
            return
        self.engine.module.eval()
        with self.state.during("validating"):
            fetch = partial(self._for_calibration, self.context)
            found = validate(self.engine.module, self.context, fetch, self.device)
        self.state.validated(found.predictions)
        tracker.log(self.step, {name: value for name, value in found.metrics.items() if name.startswith("val/")})
        judged = {"val/ce_loss", "val/loss", judged_by(self.config.run.best_by)}
        if bad := not_finite({name: value for name, value in found.metrics.items() if name in judged}):
            raise DivergedError(self.step, sorted(bad), self._checkpoints)
        if self.rank == 0:
            accuracy = 100 * found.metrics["val/task_metrics/accuracy"]
            shown = [f"{name} {found.metrics[f'val/{name}']:.4f}" for name in LOSSES if f"val/{name}" in found.metrics]
            logger.info("step %d  validation: accuracy %.1f %%, %s", self.step, accuracy, ", ".join(shown))
        if not self.context.warming_up:  # Its losses lack the KV loss, so they do not compare.
            self._keep_best(found)
        self.evaluated = self.step

    def _keep_best(self, found: Validation) -> None:
        current = {name: value for name, value in found.metrics.items() if name.startswith("val/")}
        current["step"] = float(self.step)
        best_by = self.context.config.run.best_by
        better = quality(current, best_by)
        if self.best is None or better > quality(self.best, best_by):
            self._check_state()
            self.best = current
            results = found.results(self.context, self.step)
            save_model(self.engine, self.context, self.out / BEST_MODEL, results)
            self.state.note("best", "best validation so far")
            if self.rank == 0:
                write_json(self.out / "eval_results.json", results)

    def _flush(self) -> None:
        """Puts recorded K/V on disk, and checks that the model may be saved."""
        with shared_failure(self._check_state):
            self.context.flush()

    def _check_state(self, failure: KVDistillError | None = None) -> None:
        """Raises on all ranks if one has a failure or holds numbers that are not finite. Called before every save."""
        if not self._ranks.finite.failed:
            self._ranks.finite.note(self.step, {STATE: 0.0 if self.engine.is_finite() else math.nan})
        if self._ranks.reach(failure) == FAILED:
            raise failure or KVDistillError("another rank failed; its message shows the reason")

    def _save(self, *, warming_up: bool | None = None) -> Path:
        """Saves a checkpoint. `warming_up`: whether a run that resumes from it is in the warm-up."""
        self._flush()
        state = {
            "step": self.step,
            "evaluated": self.evaluated,
            "best": self.best,
            "identity": self.context.identity,
            "round_size": self.context.sample_order.round_size,
            "warming_up": self.context.warming_up if warming_up is None else warming_up,
        }
        with self.state.during("saving"):
            path = checkpoint.save(
                self._checkpoints,
                self.engine,
                self.context.model.frozen_state() | checkpoint.map_tensors(self.context.maps),
                state,
                self.config.run.keep_checkpoints,
            )
        self.state.note("checkpoint", "checkpoint")
        return path

    def _finish(self, seconds: float) -> dict[str, Any]:
        self._flush()
        if not self.context.val:
            save_model(self.engine, self.context, self.out / BEST_MODEL, {})
        summary = run_summary(
            self.step,
            self.best or {},
            self.run_metrics,
            len(self.config.teachers),
            (self.rank, self.world_size),
            self._sum_over_ranks,
        )
        summary |= {"alignment": self.context.model.report(), "seconds": seconds}
        if self.rank == 0:
            finish(self.out, summary, self.context.identity)
            if not self.config.run.save_every:
                checkpoint.forget(self._checkpoints)  # Of earlier interruptions.
        dist.barrier()
        return summary

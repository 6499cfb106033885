"""The training loop: one process per rank, the same collectives on each whatever a teacher did."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
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
from kvcore.types import Tensor
from student_trainer.config import BEST_MODEL, OptimConfig, TrainConfig
from student_trainer.kv_sources import counters
from student_trainer.loop import checkpoint, ds_engine
from student_trainer.loop.divergence import GRADIENT_NORM, STATE, DivergedError, FiniteCheck, not_finite
from student_trainer.loop.metric_accumulator import MetricAccumulator, from_rows
from student_trainer.loop.stages import run_stages
from student_trainer.loop.training_context import TrainingContext, build
from student_trainer.loop.validation import Validation, validate
from student_trainer.model.distill_model import TrainBatch
from student_trainer.model.export import save_model
from student_trainer.monitoring.monitor import monitored
from student_trainer.monitoring.run_state import RunState
from student_trainer.monitoring.tracking import Tracker, peak_memory_mb

logger = logging.getLogger(__name__)

SHOWN = ("val/loss", "val/kv_loss")
# What a rank met; where ranks differ, the highest holds for all.
_WELL, _STOP, _FAILED, _DIVERGED = range(4)


class InterruptedRunError(KVDistillError):
    """The run was told to stop; its checkpoint lets it go on."""


def main(config_path: Path, overrides: list[str]) -> None:
    """What `kvdistill train` runs on every rank."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    try:
        train(load_config(config_path, overrides, TrainConfig))
    finally:
        ds_engine.stop()


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs a configuration on this rank, all stages of it, and returns the summary of the last.

    The process group stays, for further runs of this process: `ds_engine.stop` leaves it.
    """
    stop_tracing = tracing.start("kvdistill-trainer", f"rank{os.environ.get('RANK', '0')}")
    try:
        return run_stages(config, run)[-1] if config.stages else run(config)
    finally:
        stop_tracing()


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains to the end, or on from the newest checkpoint, and returns what `summary.json` holds."""
    rank, world_size = ds_engine.start(config.run.seed)
    with monitored(config, enabled=rank == 0) as state:
        parts = build(config, rank, world_size)
        trainer: Trainer | None = None
        try:
            trainer = Trainer(config, parts, rank, world_size, state)
            return trainer.train()
        finally:
            parts.close()
            if trainer is not None:
                trainer.engine.close()


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """The rate of the step that comes after `step` steps: linear warm-up, then the schedule down to 0."""
    warmup = round(optim.warmup_ratio * steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    done = (step - warmup) / max(1, steps - warmup)
    return optim.lr * (1 - done if optim.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


class Trainer:
    """Runs one configuration on one rank."""

    def __init__(
        self, config: TrainConfig, parts: TrainingContext, rank: int, world_size: int, state: RunState | None = None
    ) -> None:
        self.config, self.parts, self.rank, self.world_size = config, parts, rank, world_size
        self.state = RunState() if state is None else state
        self.state.connected({teacher.name: teacher.source for teacher in parts.teachers})
        self.out = config.run.output_dir
        self._checkpoints = self.out / "checkpoints"
        self.device = ds_engine.device()
        if parts.resumed is not None:
            parts.resumed.load_weights(parts.model)
        self.engine = ds_engine.Engine(parts.model, config, parts.sampling.accumulation)
        self.best: dict[str, float] | None = None
        self.step = self.evaluated = 0
        self.window, self.total = MetricAccumulator(), MetricAccumulator()
        self.collapse = CollapseDetector(list(parts.model.weights), config.fuse.collapse_at)
        self._stop_requested = False
        self._finite = FiniteCheck()
        if parts.resumed is not None:
            parts.resumed.restore(self.engine)
            self.step, self.best = parts.resumed.step, parts.resumed.state["best"]
            self.evaluated = parts.resumed.state["evaluated"]
        self._set_epoch(max(self.step - 1, 0))

    def train(self) -> dict[str, Any]:
        """The whole run."""
        summary = self.out / "summary.json"
        if self.step == self.parts.sampling.steps == self.evaluated and summary.is_file():
            return self._already_done(summary)
        before = {number: signal.signal(number, self._request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        tracker = Tracker(
            self.out, self.parts.sampling.steps, enabled=self.rank == 0, first_step=self.step, state=self.state
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

    def _already_done(self, summary: Path) -> dict[str, Any]:
        """A finished run keeps its model and its figures."""
        if self.rank == 0:
            logger.info("all %d steps are done; choose another run.output_dir, or run.resume=never", self.step)
        return json.loads(summary.read_text(encoding="utf-8"))

    def _request_stop(self, number: int, _frame: FrameType | None) -> None:
        """Asks for an end at the next micro-batch; a second signal ends at once."""
        self._stop_requested = True
        signal.signal(number, signal.SIG_DFL)

    def _loop(self, tracker: Tracker) -> None:
        if self.step > self.evaluated and self._due(self.config.run.eval_every):
            self._evaluate(tracker)  # The run ended while it did.
        batches = self._announced(self.parts.sampling.micro_batches(self.step))
        while self.step < self.parts.sampling.steps:
            self._one_step(batches)
            if self.step % self.config.run.log_every == 0 or self.step == self.parts.sampling.steps:
                self._log(tracker)
            if self._due(self.config.run.eval_every):
                self._evaluate(tracker)
            if self._due(self.config.run.save_every):
                self._save()

    def _due(self, every: int) -> bool:
        return self.step == self.parts.sampling.steps or (every > 0 and self.step % every == 0)

    def _announced(self, micro_batches: Iterator[list[int]]) -> Iterator[list[int]]:
        """Tells the sources about each micro-batch `prefetch` of them before it is used."""
        ahead: deque[list[int]] = deque()
        for indices in micro_batches:
            ahead.append(indices)
            samples = [self.parts.train[index].sample() for index in indices]
            for teacher in self.parts.teachers:
                teacher.source.announce(samples)
            if len(ahead) > self.config.kv.prefetch:
                yield ahead.popleft()
        yield from ahead

    def _one_step(self, batches: Iterator[list[int]]) -> None:
        began = time.monotonic()
        torch.manual_seed(hash((self.config.run.seed, self.step, self.rank)) % 2**63)
        self.engine.set_lr(learning_rate(self.config.optim, self.step, self.parts.sampling.steps))
        self.engine.module.train()
        self._set_epoch(self.step)
        for _ in range(self.parts.sampling.accumulation):
            batch = self._fetch([self.parts.train[index] for index in next(batches)], self.window)
            losses = {name: float(value.detach()) for name, value in self.engine.micro_step(batch).items()}
            self._finite.note(self.step + 1, losses)
            self.window.lost(losses)
        self.step += 1
        norm = self.engine.gradient_norm()
        if norm is not None:
            self._finite.note(self.step, {GRADIENT_NORM: norm})
        self.window.samples += self.config.run.global_batch
        self.window.spent(time.monotonic() - began, align_s=self.parts.model.take_align_seconds())
        self.state.stepped(self.step, self.config.run.global_batch)

    def _set_epoch(self, step: int) -> None:
        if self.parts.model.fusion is not None:
            self.parts.model.fusion.set_epoch(self.parts.sampling.epoch(step))

    def _fetch(self, records: Sequence[Record], window: MetricAccumulator) -> TrainBatch:
        """One micro-batch with its teachers' K/V; if any rank cannot go on, all of them stop here together."""
        failure: KVDistillError | None = None
        batch: TrainBatch | None = None
        try:
            batch = self.parts.batch(records, window)
        except KVDistillError as error:
            failure = error
        status = self._agree(failure)
        if status == _WELL:
            assert batch is not None
            return batch
        if self.step > 0:  # Before its first step the optimiser has no state to save, and nothing is lost.
            path = self._save()
            if self.rank == 0:
                logger.warning("checkpoint saved: %s; the same command goes on from step %d", path, self.step)
        if failure is not None:
            raise failure
        raise InterruptedRunError(
            f"{'another rank failed' if status == _FAILED else 'told to stop'} at step {self.step}"
        )

    def _agree(self, failure: KVDistillError | None) -> int:
        """The worst that any rank met, in one small collective: well, told to stop, or failed.

        Raises:
            DivergedError: on every rank, if any rank saw a figure that is not finite. Nothing of it may be saved.
        """
        own = _DIVERGED if self._finite.failed else _FAILED if failure else _STOP if self._stop_requested else _WELL
        status = torch.tensor(own, device=self.device)
        dist.all_reduce(status, op=dist.ReduceOp.MAX)
        if int(status) == _DIVERGED:
            raise DivergedError(*self._finite.agreed(self.device), self._checkpoints)
        return int(status)

    def _log(self, tracker: Tracker) -> None:
        window, self.window = self.window, MetricAccumulator()
        self.total.add(window)
        names, teachers = sorted(window.losses), [teacher.name for teacher in self.parts.teachers]
        row = [window.losses[name] for name in names] + window.teacher_rows(teachers)
        sums = torch.tensor(row, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        losses, by_teacher = sums.tolist()[: len(names)], from_rows(teachers, sums.tolist()[len(names) :])
        self.state.account(window.seconds, window.stages, by_teacher)
        per_loss = window.micro_batches * self.world_size
        metrics = {
            (name if "/" in name else f"train/{name}"): value / per_loss
            for name, value in zip(names, losses, strict=True)
        }
        metrics["train/lr"] = learning_rate(self.config.optim, self.step - 1, self.parts.sampling.steps)
        metrics["train/epoch"] = self.parts.sampling.epoch(self.step)
        metrics["train/samples_per_second"] = window.samples / window.seconds
        if self.parts.teachers:
            metrics |= window.figures(by_teacher, self.world_size)
            for teacher in self.parts.teachers:
                counted = counters(teacher.source)
                metrics |= {f"kv/{name}/{teacher.name}": counted.get(name, 0) for name in ("switches", "retries")}
            self._watch_routing(metrics)
        tracker.log(self.step, metrics)
        tracker.progress(self.step, metrics)

    def _watch_routing(self, metrics: dict[str, float]) -> None:
        """Completes the routing metrics, and warns of a router that has come to trust one teacher alone."""
        weights = {name: f"routing/weights_mean/{name}" for name in self.parts.model.weights}
        if self.config.fuse.kind == "fixed":
            metrics |= {weights[name]: weight for name, weight in self.parts.model.weights.items()}
            return
        assert self.parts.model.fusion is not None
        metrics["routing/temperature"] = self.parts.model.fusion.temperature
        warning = self.collapse.check([metrics[name] for name in weights.values()])
        if warning and self.rank == 0:
            logger.warning("step %d: %s", self.step, warning)

    def _evaluate(self, tracker: Tracker) -> None:
        if not self.parts.val:
            self.evaluated = self.step
            return
        self.engine.module.eval()
        with self.state.during("validating"):
            found = validate(
                self.engine.module, self.parts, lambda records: self._fetch(records, MetricAccumulator()), self.device
            )
        tracker.log(self.step, {name: value for name, value in found.metrics.items() if name.startswith("val/")})
        judged = ["val/loss"] + [f"val/{self.config.run.best_by}"] * (self.config.run.best_by != "accuracy")
        if bad := not_finite({name: found.metrics[name] for name in judged}):
            raise DivergedError(self.step, sorted(bad), self._checkpoints)
        if self.rank == 0:
            shown = ", ".join(f"{name} {found.metrics[name]:.4f}" for name in SHOWN if name in found.metrics)
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
            save_model(self.engine, self.parts, self.out / BEST_MODEL)
            if self.rank == 0:
                write_json(self.out / "eval_results.json", found.results(self.parts, self.step))

    def _quality(self, metrics: dict[str, float]) -> tuple[float, float]:
        """The higher, the better, by what the run is to be best in."""
        best_by = self.parts.config.run.best_by
        first = metrics["val/task_metrics/accuracy"] if best_by == "accuracy" else -metrics[f"val/{best_by}"]
        return first, -metrics["val/loss"]

    def _flush(self) -> None:
        """Puts on disk what was recorded, and makes sure that the model may be saved too."""
        failure: KVDistillError | None = None
        try:
            self.parts.flush()
        except KVDistillError as error:
            failure = error
        self._check_state(failure)

    def _check_state(self, failure: KVDistillError | None = None) -> None:
        """Comes before every save: raises on all ranks if one has a failure, or holds numbers that are not finite."""
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
            "identity": self.parts.identity,
        }
        with self.state.during("saving"):
            return checkpoint.save(
                self._checkpoints,
                self.engine,
                self.parts.model.frozen_state(),
                state,
                self.config.run.keep_checkpoints,
            )

    def _finish(self, seconds: float) -> dict[str, Any]:
        self._flush()
        if not self.parts.val:
            save_model(self.engine, self.parts, self.out / BEST_MODEL)
        peaks_R = torch.zeros(self.world_size, dtype=torch.float64, device=self.device)
        peaks_R[self.rank] = peak_memory_mb()
        dist.all_reduce(peaks_R)
        total = self.total
        sums: Tensor = torch.tensor(
            [total.stall_s, total.encoded_bytes, total.raw_bytes, total.received, total.teacher_tokens],
            dtype=torch.float64,
            device=self.device,
        )
        dist.all_reduce(sums)
        stall_s, encoded, raw, received, teacher_tokens = sums.tolist()
        teachers = len(self.parts.teachers)
        best = self.best or {}
        summary = {
            "steps": self.step,
            "best_step": int(best["step"]) if best else self.step,
            "val_task_metrics": {"accuracy": best["val/task_metrics/accuracy"]} if best else {},
            "val_kv_loss": best.get("val/kv_loss"),
            "stall_fraction": stall_s / self.world_size / max(total.seconds, 1e-9) if teachers else 0.0,
            "samples_per_second": total.samples / max(total.seconds, 1e-9),
            "bytes_per_sample": encoded / max(received, 1.0) * teachers,
            "raw_bf16_bytes_per_sample": raw / max(received, 1.0) * teachers,
            "teacher_tokens_per_second": teacher_tokens / max(total.seconds, 1e-9),
            "peak_memory_mb": {f"rank{index}": peak for index, peak in enumerate(peaks_R.tolist())},
            "alignment": self.parts.model.report(),
            "seconds": seconds,
        }
        if self.rank == 0:
            write_json(self.out / "summary.json", summary)
        dist.barrier()
        return summary

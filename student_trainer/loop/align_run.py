"""Fits the alignments of a run and its KV weight: before the first step, after the warm-up, and again on a schedule."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from data.records import Record
from student_trainer.kv_sources.kept import Kept
from student_trainer.kv_sources.shuffled import of_other_samples
from student_trainer.loop import ds_engine
from student_trainer.loop.calibrate import calibrate, scale_own_targets
from student_trainer.loop.kv_weight import auto_kv_weight
from student_trainer.loop.metric_accumulator import MetricAccumulator
from student_trainer.loop.rank_failures import fail_together, shared_failure
from student_trainer.loop.student_maps import lacks_maps, with_student_maps
from student_trainer.model.distill_model import TrainBatch
from student_trainer.model.partitions import gathered_in_passes
from student_trainer.monitoring.alignment_report import AlignmentReport

if TYPE_CHECKING:
    from student_trainer.loop.training_context import TrainingContext

# Fetches batches of records from a context's sources.
FetchFrom = Callable[["TrainingContext", Iterable[Sequence[Record]]], Iterator[TrainBatch]]

logger = logging.getLogger(__name__)

# Micro-batches whose gradients set loss.kv_weight when it is `auto`.
KV_WEIGHT_BATCHES = 4
# Encoded K/V of all teachers that a rank keeps in memory while it calibrates.
KEPT_BYTES = 2**30


def align(context: TrainingContext, fetch: FetchFrom) -> TrainingContext:
    """Calibrates the alignments, or loads them from the checkpoint that the run resumes from.

    Returns:
        The context to train with. Its teachers apply the maps that were fitted, if `align.map_at` says so; everything
        else is then measured on what they send.
    """
    if context.resumed is not None:
        frozen = context.resumed.frozen()
        if frozen:
            context.model.load_frozen(frozen)
            return context
        context.resumed.load_weights(context.model)  # Of the warmed student.
    # A rank runs the head once per chunk of its own tokens.
    head = context.model.student.lm.get_output_embeddings()
    with ExitStack() as undo, gathered_in_passes(context.model, held=head):
        if lacks_maps(context):
            asking, records = _calibrate(context, fetch)
            size = context.config.run.micro_batch
            parts = [records[at : at + size] for at in range(0, len(records), size)]
            context = with_student_maps(context, fetched(asking, parts), undo)
        asking, records = _calibrate(context, fetch)
        if context.config.loss.kv_weight == "auto":
            _set_kv_weight(asking, records)
        undo.pop_all()
    _report(context, context.first_step)
    return context


def recalibrate(context: TrainingContext, fetch: FetchFrom, step: int) -> None:
    """Fits frozen maps and the targets' scale again, to the student after `step` steps. The KV weight stays."""
    frozen = context.model.frozen_state()
    context.model.kv_weight = float(frozen["kv_weight"])
    _calibrate(context, fetch)
    _report(context, step)


def _calibrate(context: TrainingContext, fetch: FetchFrom) -> tuple[TrainingContext, list[Record]]:
    """Fits the alignments; returns this rank's calibration samples, and a context that has their K/V in memory."""
    config, rank = context.config, dist.get_rank()
    indices = context.sample_order.first(config.align.calibration_samples)
    numbers = [rank + dist.get_world_size() * position for position in range(len(indices))]
    records = [context.train[index] for index in indices]
    size, within = config.run.micro_batch, config.align.settled_within
    if config.self_teacher:
        scale_own_targets(context.model, records, numbers, partial(fetch, context), size, fail_together)
        return context, records
    # Passes after the first one, and the KV weight, need the same K/V.
    most_bytes = KEPT_BYTES // len(context.sources)
    kept = {name: Kept(source.without_control(), most_bytes) for name, source in context.sources.items()}
    asking = dataclasses.replace(context, sources=kept, lost=None)
    calibrate(context.model, records, numbers, partial(fetch, asking), size, fail_together, within)
    return asking, records


def _report(context: TrainingContext, step: int) -> None:
    """Logs and writes the alignments, if there are any, fitted after `step` steps."""
    if dist.get_rank() > 0 or not context.model.aligners:
        return
    for name, report in context.model.report().items():
        explained = "; ".join(f"{kind} {_by_layer(by)}" for kind, by in report["explained_variance"].items())
        logger.info("alignment with '%s': explained variance by layer: %s", name, explained)
    context.config.run.output_dir.mkdir(parents=True, exist_ok=True)
    AlignmentReport(context.model.report(), step).write(context.config.run.output_dir)


def fetched(context: TrainingContext, batches: Iterable[Sequence[Record]]) -> Iterator[TrainBatch]:
    """The batches with their teachers' K/V, requested ahead, on this rank alone."""
    for records, pending in context.submitted(batches, control=False):
        yield context.batch(records, MetricAccumulator(), pending)


def _by_layer(values: Sequence[float | None]) -> str:
    return " ".join("?" if value is None else f"{value:.2f}" for value in values)


def _set_kv_weight(context: TrainingContext, records: Sequence[Record]) -> None:
    """Sets `loss.kv_weight: auto` from the gradients of the first micro-batches, under `kv.control`."""
    size = context.config.run.micro_batch
    # Whole ones; a rank with fewer samples than a micro-batch has one smaller batch.
    fewest = torch.tensor(max(1, len(records) // size), device=ds_engine.device())
    dist.all_reduce(fewest, op=dist.ReduceOp.MIN)  # Ranks that share parameters must run the same passes.
    chosen = [records[at * size : (at + 1) * size] for at in range(min(KV_WEIGHT_BATCHES, int(fewest)))]
    batches: list[TrainBatch] = []
    with shared_failure():
        for part, pending in context.submitted(chosen, control=False):
            shuffled = context.config.kv.control == "shuffled"
            asked = [of_other_samples(one) for one in pending] if shuffled else pending
            stage = context.latent_steps(context.first_step)
            batches.append(context.batch(part, MetricAccumulator(), asked, stage))
    loss = context.config.loss
    measured = auto_kv_weight(context.model, batches, loss.kv_gradient_ratio, dist.all_reduce)
    context.model.set_kv_weight(min(measured, loss.kv_weight_max))
    if dist.get_rank() == 0:
        limited = f", limited by loss.kv_weight_max to {loss.kv_weight_max:.4g}" * (measured > loss.kv_weight_max)
        logger.info("loss.kv_weight auto: %.4g%s", measured, limited)

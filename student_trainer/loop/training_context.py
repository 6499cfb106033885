"""Builds everything that a run needs from its configuration."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from align.aligner import Aligner
from align.head_dim_adapter import KVGeometry
from align.teacher_plan import plan_for
from data.collate import Collator
from data.records import Record, content_digest, load_records
from kvcore.errors import TeacherRefusedError
from kvcore.plan import KVPlan
from kvcore.tensors.projections import kv_projections
from kvcore.types import BatchKV, TeacherInfo
from student_trainer.config import StudentConfig, TrainConfig
from student_trainer.kv_sources import KVSource, PendingKV, build_source
from student_trainer.kv_sources.kv_batch import decode_and_pad
from student_trainer.loop import checkpoint, ds_engine
from student_trainer.loop.calibrate import calibrate
from student_trainer.loop.checkpoint import Checkpoint
from student_trainer.loop.kv_weight import auto_kv_weight
from student_trainer.loop.metric_accumulator import MetricAccumulator
from student_trainer.loop.rank_failures import fail_together, shared_failure
from student_trainer.loop.sample_order import SampleOrder
from student_trainer.model.distill_model import DistillModel, TrainBatch
from student_trainer.model.latent import LatentStudent, load_reasoning, new_reasoning
from student_trainer.model.pretrained import load_pretrained
from student_trainer.monitoring.alignment_report import AlignmentReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Micro-batches whose gradients set loss.kv_weight when it is `auto`.
KV_WEIGHT_BATCHES = 4


@dataclass(frozen=True, slots=True)
class TrainingContext:
    """Everything that a run trains with.

    Attributes:
        config: the run's configuration.
        tokenizer: the student's tokenizer, saved with the best model.
        collator: turns records into padded batches of the student's tokens.
        train: the training records.
        val: the validation records; empty without `data.val`.
        sources: each teacher's connected KV source by name, in the order of the configuration.
        model: student, calibrated alignments and losses.
        sample_order: this rank's micro-batches, by step.
        resumed: the checkpoint that the run resumes from; None for a new run.
        identity: the settings, teachers and data that must be the same when the run resumes.
    """

    config: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    collator: Collator
    train: Sequence[Record]
    val: Sequence[Record]
    sources: Mapping[str, KVSource]
    model: DistillModel
    sample_order: SampleOrder
    resumed: Checkpoint | None
    identity: dict[str, Any]

    def submit(self, records: Sequence[Record]) -> list[PendingKV]:
        """Requests every teacher's K/V of a training batch, under `kv.control`, without waiting for them."""
        samples = [record.sample() for record in records]
        return [source.submit(samples) for source in self.sources.values()]

    def batch(
        self, records: Sequence[Record], metrics: MetricAccumulator, pending: Sequence[PendingKV] | None = None
    ) -> TrainBatch:
        """Tokens and every teacher's K/V of the records, on this rank's device. Adds times and bytes to `metrics`.

        Args:
            records: the micro-batch.
            metrics: where to count what the teachers sent.
            pending: what `submit` returned for the records. Without it K/V are fetched now, and each record gets its
                own whatever `kv.control` says: so do alignment and validation.
        """
        if pending is None:
            samples = [record.sample() for record in records]
            pending = [source.without_control().submit(samples) for source in self.sources.values()]
        fills_latents = self.config.student.mode == "latent" and self.config.align.time == "none"
        slots = self.config.student.latents if fills_latents else None
        device = ds_engine.device()
        caches: list[BatchKV] = []
        for (name, source), requested in zip(self.sources.items(), pending, strict=True):
            began = time.monotonic()
            results = requested.result()
            received = time.monotonic()
            kv, sums = decode_and_pad(name, results, source.info, source.plan, slots, self.config.kv.on_missing)
            caches.append(kv.to(device))
            sums.seconds.update(stall=received - began, decode=time.monotonic() - received)
            metrics.add_teacher(name, sums)
        return TrainBatch(self.collator(records).to(device), tuple(caches))

    def flush(self) -> None:
        """Puts everything recorded so far on disk."""
        for source in self.sources.values():
            source.flush()

    def close(self) -> None:
        """Ends every source's threads, connections and files."""
        for source in self.sources.values():
            source.close()


def build_context(config: TrainConfig, rank: int, world_size: int) -> TrainingContext:
    """Loads data and student, connects to the teachers, and calibrates alignments or loads them from a checkpoint.

    Raises:
        ConfigError: a path or a setting cannot be used.
        TeacherError: a teacher cannot be reached or refuses the plan.
    """
    train = load_records(config.data.train)
    val = load_records(config.data.val, config.data.val_samples) if config.data.val else []
    sample_order = SampleOrder(config.run, len(train), rank, world_size)
    lm, tokenizer = _load_student(config.student)
    student = _with_latents(lm, config)
    with ExitStack() as undo:
        sources, aligners = _connect(config, lm, rank, world_size, undo)
        weights = {teacher.name: teacher.weight for teacher in config.teachers}
        model = DistillModel(student, aligners, weights, config).to(ds_engine.device())
        identity = _identity(config, len(train), sources)
        resumed = _resume(config, identity, rank)
        collator = Collator(tokenizer, config.data.max_tokens)
        context = TrainingContext(
            config, tokenizer, collator, train, val, sources, model, sample_order, resumed, identity
        )
        if sources:
            _align(context, rank, world_size)
        undo.pop_all()
    return context


def _load_student(settings: StudentConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    lm, tokenizer = load_pretrained(settings.path, settings.dtype, "student.path")
    kv_projections(lm)  # Raises if the student's K/V cannot be captured.
    if settings.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return lm, tokenizer


def _with_latents(lm: PreTrainedModel, config: TrainConfig) -> LatentStudent:
    settings = config.student
    latent = settings.mode == "latent"
    reasoning = load_reasoning(lm, Path(settings.path), settings.latents, settings.passes) if latent else None
    if reasoning is None:
        reasoning = new_reasoning(lm, settings.latents, settings.passes, config.run.seed)
    # Parameters that never get a gradient would stop ZeRO from reducing the others.
    reasoning.requires_grad_(latent)
    return LatentStudent(lm, reasoning.to(lm.dtype))


def _connect(
    config: TrainConfig, lm: PreTrainedModel, rank: int, world_size: int, undo: ExitStack
) -> tuple[dict[str, KVSource], list[Aligner]]:
    """Connects to every teacher, and makes its alignment, not calibrated yet. `undo` closes the sources.

    Raises:
        TeacherRefusedError: a teacher does not offer the selector.
    """
    projections = kv_projections(lm)
    heads = int(getattr(lm.config, "num_key_value_heads", None) or lm.config.num_attention_heads)
    geometry = KVGeometry(len(projections), heads, projections[0].head_dim)
    settings = config.align.model_dump(exclude={"time", "calibration_samples"})

    def plan(info: TeacherInfo) -> KVPlan:
        return plan_for(
            geometry,
            KVGeometry(info.layers, info.kv_heads, info.head_dim),
            selection=config.kv.selection,
            codec=config.kv.codec,
            layer_map=config.align.layer_map,
            head_adapter=config.align.head_adapter,
        )

    sources: dict[str, KVSource] = {}
    aligners: list[Aligner] = []
    for teacher in config.teachers:
        source = sources[teacher.name] = build_source(teacher, config.kv, plan, rank, world_size)
        undo.callback(source.close)
        info, selector = source.info, config.kv.selection.selector
        if selector not in info.selectors:
            offered = ", ".join(info.selectors)
            raise TeacherRefusedError(teacher.name, f"offers the selectors {offered}, not '{selector}'")
        if rank == 0:
            shape = f"{info.layers} layers, {info.kv_heads} KV heads of {info.head_dim}"
            logger.info("teacher '%s': %s, %s", teacher.name, info.model, shape)
        own_geometry = KVGeometry(info.layers, info.kv_heads, info.head_dim)
        aligners.append(Aligner(own_geometry, geometry, **settings).to(ds_engine.device()))
    return sources, aligners


def _identity(config: TrainConfig, count: int, sources: Mapping[str, KVSource]) -> dict[str, Any]:
    """What must not change when a run resumes. `kv.mode` may: online, offline and record give the same run."""
    settings = config.model_dump(mode="json", include={"student", "align", "fuse", "loss", "optim"})
    run = config.run.model_dump(mode="json", include={"seed", "steps", "epochs", "global_batch"})
    plans = {
        name: [source.info.weights_digest, source.info.tokenizer_fingerprint, source.plan.digest()]
        for name, source in sources.items()
    }
    weights = {teacher.name: teacher.weight for teacher in config.teachers}
    # The path alone does not identify the model: an earlier stage may have been trained again.
    settings["student"]["weights"] = [
        content_digest(path) for path in sorted(Path(config.student.path).glob("*.safetensors"))
    ]
    data = [count, content_digest(config.data.train)]
    return settings | {"run": run, "teachers": plans, "weights": weights, "control": config.kv.control, "data": data}


def _resume(config: TrainConfig, identity: dict[str, Any], rank: int) -> Checkpoint | None:
    """The checkpoint to resume from: the newest that rank 0 sees, checked on every rank."""
    directory = config.run.output_dir / "checkpoints"
    if config.run.resume == "never":
        if rank == 0:
            checkpoint.forget(directory)
        dist.barrier()
        return None
    newest = checkpoint.latest(directory) if rank == 0 else None
    step = torch.tensor(newest.step if newest else -1, device=ds_engine.device())
    dist.broadcast(step, 0)
    if int(step) < 0:
        return None
    found: Checkpoint | None = None
    with shared_failure():
        found = checkpoint.at(directory, int(step))
        checkpoint.check_same_run(found, identity)
    if found is not None and rank == 0:
        logger.info("resuming from %s", found.path)
    return found


def _align(context: TrainingContext, rank: int, world_size: int) -> None:
    """Calibrates the alignments, or loads them from the checkpoint that the run resumes from."""
    if context.resumed is not None:
        context.model.load_frozen(context.resumed.frozen())
        return
    config = context.config
    indices = context.sample_order.first(config.align.calibration_samples)
    numbers = [rank + world_size * position for position in range(len(indices))]
    records = [context.train[index] for index in indices]
    calibrate(
        context.model,
        records,
        numbers,
        lambda chosen: context.batch(chosen, MetricAccumulator()),
        config.run.micro_batch,
        fail_together,
    )
    if config.loss.kv_weight == "auto":
        _set_kv_weight(context, records, rank)
    if rank == 0:
        for name, report in context.model.report().items():
            explained = "; ".join(f"{kind} {_by_layer(by)}" for kind, by in report["explained_variance"].items())
            logger.info("alignment with '%s': explained variance by layer: %s", name, explained)
        config.run.output_dir.mkdir(parents=True, exist_ok=True)
        AlignmentReport(context.model.report()).write(config.run.output_dir)


def _by_layer(values: Sequence[float | None]) -> str:
    return " ".join("?" if value is None else f"{value:.2f}" for value in values)


def _set_kv_weight(context: TrainingContext, records: Sequence[Record], rank: int) -> None:
    """Sets `loss.kv_weight: auto` from the gradients of the first micro-batches."""
    size = context.config.run.micro_batch
    chosen = [records[start : start + size] for start in range(0, len(records) - size + 1, size)][:KV_WEIGHT_BATCHES]
    batches: list[TrainBatch] = []
    with shared_failure():
        batches = [context.batch(part, MetricAccumulator(), context.submit(part)) for part in chosen]
    weight = auto_kv_weight(context.model, batches, context.config.loss.kv_gradient_ratio, dist.all_reduce)
    context.model.set_kv_weight(weight)
    if rank == 0:
        logger.info("loss.kv_weight auto: %.4g", weight)

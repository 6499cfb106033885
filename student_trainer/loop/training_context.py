"""Makes everything that a run needs from its configuration."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
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
from kvcore.errors import KVDistillError, TeacherRefusedError
from kvcore.plan import KVPlan
from kvcore.tensors.projections import kv_projections
from kvcore.types import BatchKV, TeacherInfo
from student_trainer.config import StudentConfig, TeacherConfig, TrainConfig
from student_trainer.kv_sources import build_source, flush, unshuffled
from student_trainer.kv_sources.base import KVSource
from student_trainer.kv_sources.kv_batch import decode_and_pad
from student_trainer.loop import checkpoint, ds_engine
from student_trainer.loop.calibrate import calibrate
from student_trainer.loop.checkpoint import Checkpoint
from student_trainer.loop.kv_weight import auto_kv_weight
from student_trainer.loop.metric_accumulator import MetricAccumulator
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
class Teacher:
    """One teacher of the run, connected."""

    name: str
    source: KVSource


@dataclass(frozen=True, slots=True)
class TrainingContext:
    """A run, ready to train."""

    config: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    collator: Collator
    train: Sequence[Record]
    val: Sequence[Record]
    teachers: tuple[Teacher, ...]
    model: DistillModel
    sampling: SampleOrder
    resumed: Checkpoint | None
    identity: dict[str, Any]

    def batch(self, records: Sequence[Record], window: MetricAccumulator) -> TrainBatch:
        """Tokens and every teacher's K/V for records, on this rank's device; what it took is added to `window`."""
        samples = [record.sample() for record in records]
        caches: list[BatchKV] = []
        fills_latents = self.config.student.mode == "latent" and self.config.align.time == "none"
        slots = self.config.student.latents if fills_latents else None
        for teacher in self.teachers:
            began = time.monotonic()
            # A control breaks the pairs that training learns from; alignment and validation keep the true ones.
            source = teacher.source if self.model.training else unshuffled(teacher.source)
            results = source.fetch(samples)
            fetched = time.monotonic()
            received = decode_and_pad(
                teacher.name, results, teacher.source.info, teacher.source.plan, slots, self.config.kv.on_missing
            )
            caches.append(received.kv.to(ds_engine.device()))
            window.receive(teacher.name, received, waited_s=fetched - began, decode_s=time.monotonic() - fetched)
        return TrainBatch(self.collator(records).to(ds_engine.device()), tuple(caches))

    def flush(self) -> None:
        """Puts on disk what was recorded so far."""
        for teacher in self.teachers:
            flush(teacher.source)

    def close(self) -> None:
        """Ends every source's threads, connections and files."""
        for teacher in self.teachers:
            teacher.source.close()


def build(config: TrainConfig, rank: int, world_size: int) -> TrainingContext:
    """Loads data and student, connects to the teachers, and calibrates or takes alignments from a checkpoint.

    Raises:
        ConfigError: a path or a setting cannot be used.
        TeacherError: a teacher cannot be reached or refuses the plan.
    """
    train = load_records(config.data.train)
    val = load_records(config.data.val, config.data.val_samples) if config.data.val else []
    sampling = SampleOrder(config.run, len(train), rank, world_size)
    lm, tokenizer = _load_student(config.student)
    student = _with_latents(lm, config)
    teachers: list[Teacher] = []
    try:
        aligners = [_connect(teacher, config, lm, teachers, rank, world_size) for teacher in config.teachers]
        weights = {teacher.name: teacher.weight for teacher in config.teachers}
        model = DistillModel(student, aligners, weights, config).to(ds_engine.device())
        identity = _identity(config, len(train), teachers)
        resumed = _resume(config, identity, rank)
        collator = Collator(tokenizer, config.data.max_tokens)
        parts = TrainingContext(
            config, tokenizer, collator, train, val, tuple(teachers), model, sampling, resumed, identity
        )
        if teachers:
            _align(parts, rank, world_size)
    except BaseException:
        for teacher in teachers:
            teacher.source.close()
        raise
    return parts


def _load_student(settings: StudentConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    lm, tokenizer = load_pretrained(settings.path, settings.dtype, "student.path")
    kv_projections(lm)
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
    teacher: TeacherConfig,
    config: TrainConfig,
    lm: PreTrainedModel,
    connected: list[Teacher],
    rank: int,
    world_size: int,
) -> Aligner:
    """Opens a teacher's source and makes its (not yet calibrated) alignment; the source is appended to `connected`."""
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

    source = build_source(teacher, config.kv, plan, rank, world_size)
    connected.append(Teacher(teacher.name, source))
    info = source.info
    if config.kv.selection.selector not in info.selectors:
        raise TeacherRefusedError(
            teacher.name, f"offers the selectors {', '.join(info.selectors)}, not '{config.kv.selection.selector}'"
        )
    if rank == 0:
        logger.info(
            "teacher '%s': %s, %d layers, %d KV heads of %d",
            teacher.name,
            info.model,
            info.layers,
            info.kv_heads,
            info.head_dim,
        )
    return Aligner(KVGeometry(info.layers, info.kv_heads, info.head_dim), geometry, **settings).to(ds_engine.device())


def _identity(config: TrainConfig, count: int, teachers: Sequence[Teacher]) -> dict[str, Any]:
    """What must not change when a run goes on. Where K/V come from may: online, offline and record are one run."""
    settings = config.model_dump(mode="json", include={"student", "align", "fuse", "loss", "optim"})
    run = config.run.model_dump(mode="json", include={"seed", "steps", "epochs", "global_batch"})
    plans = {
        teacher.name: [
            teacher.source.info.weights_digest,
            teacher.source.info.tokenizer_fingerprint,
            teacher.source.plan.digest(),
        ]
        for teacher in teachers
    }
    weights = {teacher.name: teacher.weight for teacher in config.teachers}
    # A path is no proof: an earlier stage may have been trained anew.
    settings["student"]["weights"] = [
        content_digest(path) for path in sorted(Path(config.student.path).glob("*.safetensors"))
    ]
    data = [count, content_digest(config.data.train)]
    return settings | {"run": run, "teachers": plans, "weights": weights, "control": config.kv.control, "data": data}


def _resume(config: TrainConfig, identity: dict[str, Any], rank: int) -> Checkpoint | None:
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
    failure: KVDistillError | None = None
    try:
        found = checkpoint.at(directory, int(step))
        checkpoint.check_same_run(found, identity)
    except KVDistillError as error:
        failure = error
    fail_together(failure)
    if found is not None and rank == 0:
        logger.info("resuming from %s", found.path)
    return found


def _align(parts: TrainingContext, rank: int, world_size: int) -> None:
    if parts.resumed is not None:
        parts.model.load_frozen(parts.resumed.frozen())
        return
    config = parts.config
    indices = parts.sampling.first(config.align.calibration_samples)
    numbers = [rank + world_size * position for position in range(len(indices))]
    records = [parts.train[index] for index in indices]
    calibrate(
        parts.model,
        records,
        numbers,
        lambda chosen: parts.batch(chosen, MetricAccumulator()),
        config.run.micro_batch,
        fail_together,
    )
    if config.loss.kv_weight == "auto":
        _set_kv_weight(parts, records, rank)
    if rank == 0:
        for name, report in parts.model.report().items():
            said = (f"{kind} {_by_layer(values)}" for kind, values in report["explained_variance"].items())
            logger.info("alignment with '%s': explained variance by layer: %s", name, "; ".join(said))
        config.run.output_dir.mkdir(parents=True, exist_ok=True)
        AlignmentReport(parts.model.report()).write(config.run.output_dir)


def _by_layer(values: Sequence[float | None]) -> str:
    return " ".join("?" if value is None else f"{value:.2f}" for value in values)


def _set_kv_weight(parts: TrainingContext, records: Sequence[Record], rank: int) -> None:
    size = parts.config.run.micro_batch
    chosen = [records[start : start + size] for start in range(0, len(records) - size + 1, size)][:KV_WEIGHT_BATCHES]
    parts.model.train()
    failure: KVDistillError | None = None
    batches: list[TrainBatch] = []
    try:
        batches = [parts.batch(part, MetricAccumulator()) for part in chosen]
    except KVDistillError as error:
        failure = error
    fail_together(failure)
    weight = auto_kv_weight(parts.model, batches, parts.config.loss.kv_gradient_ratio, dist.all_reduce)
    parts.model.set_kv_weight(weight)
    if rank == 0:
        logger.info("loss.kv_weight auto: %.4g", weight)


def fail_together(failure: KVDistillError | None) -> None:
    """Raises this rank's error, or one that says another rank failed: no rank is left waiting in a collective."""
    failed = torch.tensor(int(failure is not None), device=ds_engine.device())
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if failure is not None:
        raise failure
    if int(failed):
        raise KVDistillError("another rank failed; its message says why")

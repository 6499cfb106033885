"""Builds everything that a run needs from its configuration."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from data.collate import Collator
from data.records import Record
from kvcore.errors import FieldError
from kvcore.tensors.kv_map import KVMap
from kvcore.types import BatchKV
from student_trainer.config import TrainConfig
from student_trainer.config_checks import shared_endpoint_warning, step_blocks
from student_trainer.kv_sources import KVSource, PendingKV
from student_trainer.kv_sources.kv_batch import decode_and_pad
from student_trainer.kv_sources.shuffled import warn_of_control
from student_trainer.loop import checkpoint, ds_engine, finished_run
from student_trainer.loop.align_run import FetchFrom, align, fetched
from student_trainer.loop.checkpoint import Checkpoint
from student_trainer.loop.curriculum import curriculum_of
from student_trainer.loop.data_survey import log_padding, survey, with_answer_tokens
from student_trainer.loop.lost_teachers import LostTeachers
from student_trainer.loop.metric_accumulator import MetricAccumulator
from student_trainer.loop.rank_failures import shared_failure
from student_trainer.loop.run_identity import run_identity
from student_trainer.loop.sample_order import SampleOrder
from student_trainer.loop.student_loading import check_lengths, is_partitioned_at_load, load_student, with_latents
from student_trainer.loop.teacher_sources import (
    aligner_for,
    connect_teacher,
    fits_bases,
    known_maps,
    map_of_store,
    map_setting,
    reading_style,
    samples_of,
    teacher_bases,
    use_maps,
)
from student_trainer.loop.training_records import train_records, val_records
from student_trainer.model.distill_model import DistillModel, TrainBatch
from student_trainer.model.pretrained import set_special_tokens
from student_trainer.model.self_teacher import geometry_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingContext:
    """Everything that a run trains with.

    Attributes:
        config: the run's configuration, with `data.answer_tokens` if there are validation records.
        tokenizer: the student's tokenizer, saved with the best model.
        collator: turns records into padded batches of the student's tokens.
        train: the training records.
        val: the validation records; empty without `data.val`.
        sources: each teacher's connected KV source by name, in the order of the configuration; empty in the warm-up.
        model: student, calibrated alignments and losses; without alignments in the warm-up.
        sample_order: this rank's micro-batches, by step.
        resumed: the checkpoint that the run resumes from; None for a new run.
        identity: the settings, teachers and data that must be the same when the run resumes.
        finished: whether the run has ended before; it has no calibrated alignments then.
        waiting: the sources that get no requests until the warm-up has ended.
        maps: the map that each teacher applies, by the teacher's name; empty if they apply none.
        lost: what to do about teachers that do not answer; None where each must answer, as in calibration.
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
    finished: bool = False
    waiting: Mapping[str, KVSource] = dataclasses.field(default_factory=dict)
    maps: Mapping[str, KVMap] = dataclasses.field(default_factory=dict)
    lost: LostTeachers | None = None

    @property
    def warming_up(self) -> bool:
        """Whether the run trains on cross-entropy alone, before alignments are fitted."""
        return bool(self.waiting)

    @property
    def first_step(self) -> int:
        """The step before which the optimiser starts without moments: 0, or the end of the warm-up after it."""
        return self.config.align.warmup_steps if self.sources else 0

    @property
    def connected(self) -> dict[str, KVSource]:
        """The sources of all teachers."""
        return {**self.sources, **self.waiting}

    @property
    def answer_tokens(self) -> int:
        """Maximum number of tokens that the student generates in validation."""
        limit = self.config.data.answer_tokens
        assert limit is not None, "with_answer_tokens sets it if there are validation records"
        return limit

    def latent_steps(self, step: int) -> int | None:
        """How many steps of the reasoning are latent in the optimiser step after `step` steps; None: no curriculum."""
        curriculum = curriculum_of(self.config, self.sample_order)
        return None if curriculum is None else curriculum.stage(step)

    def submit(self, records: Sequence[Record], *, control: bool) -> list[PendingKV]:
        """Requests every teacher's K/V of a batch without waiting for them.

        Args:
            records: the batch.
            control: under `kv.control`, as in training. Otherwise each record gets its own K/V.
        """
        formats = {teacher.name: reading_style(self.config, teacher) for teacher in self.config.teachers}
        samples = {style: samples_of(self.config, records, style) for style in set(formats.values())}
        return [
            (source if control else source.without_control()).submit(samples[formats[name]])
            for name, source in self.sources.items()
        ]

    def submitted(
        self, batches: Iterable[Sequence[Record]], *, control: bool
    ) -> Iterator[tuple[Sequence[Record], list[PendingKV]]]:
        """Each batch with its requests, submitted to all teachers `kv.prefetch` batches before it is used."""
        ahead: deque[tuple[Sequence[Record], list[PendingKV]]] = deque()
        for records in batches:
            ahead.append((records, self.submit(records, control=control)))
            if len(ahead) > self.config.kv.prefetch:
                yield ahead.popleft()
        yield from ahead

    def batch(
        self,
        records: Sequence[Record],
        metrics: MetricAccumulator,
        pending: Sequence[PendingKV],
        latent_steps: int | None = None,
    ) -> TrainBatch:
        """Tokens and every teacher's K/V of the records, on this rank's device. Adds times and bytes to `metrics`.

        Args:
            records: the micro-batch.
            metrics: where to count what the teachers sent.
            pending: what `submit` returned for the records.
            latent_steps: how many steps of the reasoning are latent, in training with a curriculum; None: all.
        """
        fills_latents = self.config.student.mode == "latent" and self.config.align.time == "none"
        slots = self.config.student.latents if fills_latents else None
        device = ds_engine.device()
        caches: list[BatchKV] = []
        for (name, source), requested in zip(self.sources.items(), pending, strict=True):
            began = time.monotonic()
            on_missing = self.config.kv.on_missing
            if self.lost is None:
                results = requested.result()
            else:
                results, on_missing = self.lost.results(name, requested, records)
            received = time.monotonic()
            kv, sums = decode_and_pad(name, results, source.info, source.plan, slots, on_missing)
            caches.append(kv.to(device))
            sums.seconds.update(stall=received - began, decode=time.monotonic() - received)
            metrics.add_teacher(name, sums)
        if self.lost is not None:
            self.lost.check()
        tokens = self.collator(records, latent_steps)
        metrics.add_text(tokens.text_mask_BT)
        return TrainBatch(tokens.to(device), tuple(caches))

    def flush(self) -> None:
        """Puts everything recorded so far on disk."""
        for source in self.connected.values():
            source.flush()

    def close(self) -> None:
        """Ends every source's threads, connections and files."""
        for source in self.connected.values():
            source.close()


def build_context(config: TrainConfig, rank: int, world_size: int) -> TrainingContext:
    """Loads data and student, connects to the teachers, and calibrates alignments or loads them from a checkpoint.

    Raises:
        ConfigError: a path or a setting cannot be used.
        TeacherError: a teacher cannot be reached or refuses the plan.
    """
    if rank == 0 and (warning := config.kv.selection.warning):
        logger.warning("kv.selection: %s", warning)
    if rank == 0 and (warning := shared_endpoint_warning(config)):
        logger.warning("teachers: %s", warning)
    if rank == 0 and config.self_teacher and config.kv.control == "shuffled":
        warn_of_control()
    train, val = train_records(config.data), val_records(config.data)
    sample_order = SampleOrder(config.run, len(train), rank, world_size)
    if config.teachers and config.align.warmup_steps >= sample_order.steps:
        raise FieldError("align.warmup_steps", f"must be below the run's number of steps ({sample_order.steps})")
    curriculum_of(config, sample_order)  # Raises if the run is too short for it.
    lm, tokenizer = load_student(config.student, config.run.seed, partitioned=is_partitioned_at_load(config))
    chat, system_prompt = config.data.format == "chat", config.data.system_prompt or ""
    blocks = step_blocks(config)
    collator = Collator(tokenizer, config.data.max_tokens, chat=chat, system_prompt=system_prompt, step_blocks=blocks)
    splits = survey(config, collator, train, val)
    config = with_answer_tokens(config, splits)
    check_lengths(config, lm, splits)
    # The collator decides which token ends a text.
    set_special_tokens(lm, tokenizer)
    with ExitStack() as undo:
        student = geometry_of(lm)
        connect = partial(connect_teacher, config, student, rank, world_size, undo)
        sources = {one.name: connect(one, map_of_store(config, student, one)) for one in config.teachers}
        identity = run_identity(config, len(train), sources)
        finished = _is_finished(config, rank)
        resumed = None if finished else _resume(config, identity, rank)
        if config.data.sort_by_length:
            sample_order.sort_by(splits[0].lengths(), resumed.state["round_size"] if resumed else None)
        log_padding(sample_order, splits[0])
        maps: dict[str, KVMap] = {}
        if fits_bases(config) and not finished:
            chosen = sample_order.first(config.align.calibration_samples)
            maps = teacher_bases(config, student, sources, resumed, collator, [train[at] for at in chosen])
        elif map_setting(config) is not None and not finished:
            maps = known_maps(config, student, resumed)
        use_maps(config, sources, maps, connect)
        cold = config.align.warmup_steps > 0 and (resumed is None or resumed.state["warming_up"])
        asked, waiting = ({}, sources) if cold and not finished else (sources, {})
        context = TrainingContext(
            config,
            tokenizer,
            collator,
            train,
            val,
            asked,
            _model(config, lm, asked),
            sample_order,
            resumed,
            identity,
            finished,
            waiting,
            maps,
            LostTeachers(config.kv, len(config.teachers)),
        )
        if (asked or config.self_teacher) and not finished:
            context = align(context, fetched)
        undo.pop_all()
    return context


def end_warmup(context: TrainingContext, saved: Checkpoint, fetch: FetchFrom) -> TrainingContext:
    """The context for the rest of the run: the warmed student with all losses, and alignments fitted to it.

    It is the same as if the run resumed from the checkpoint that ends the warm-up.

    Args:
        context: of the warm-up. Its model is not usable afterwards.
        saved: the checkpoint that ends the warm-up.
        fetch: fetches batches for calibration.
    """
    for parameter in context.model.parameters():
        parameter.data = parameter.data.new_empty(0)  # Frees the memory for the next model.
    config = context.config
    lm, _ = load_student(config.student, config.run.seed, partitioned=is_partitioned_at_load(config))
    set_special_tokens(lm, context.tokenizer)
    model = _model(config, lm, context.waiting)
    after = dataclasses.replace(context, sources=context.waiting, waiting={}, model=model, resumed=saved)
    return align(after, fetch)


def _model(config: TrainConfig, lm: PreTrainedModel, sources: Mapping[str, KVSource]) -> DistillModel:
    """The student with an alignment with each teacher, not calibrated yet."""
    geometry = geometry_of(lm)
    aligners = [aligner_for(config, geometry, source) for source in sources.values()]
    weights = {teacher.name: teacher.weight for teacher in config.teachers if teacher.name in sources}
    return DistillModel(with_latents(lm, config), aligners, weights, config).to(ds_engine.device())


def _is_finished(config: TrainConfig, rank: int) -> bool:
    """Whether rank 0 sees a finished run in the output directory. A run that starts over removes its mark."""
    directory = config.run.output_dir
    if rank == 0 and config.run.resume == "never":
        finished_run.forget(directory)
    found = torch.tensor(int(rank == 0 and finished_run.is_finished(directory)), device=ds_engine.device())
    dist.broadcast(found, 0)
    return bool(found)


def _resume(config: TrainConfig, identity: dict[str, Any], rank: int) -> Checkpoint | None:
    """The checkpoint to resume from: the newest that rank 0 finds intact. Every rank checks that it is of this run."""
    directory = config.run.output_dir / "checkpoints"
    if config.run.resume == "never":
        if rank == 0:
            checkpoint.forget(directory)
        dist.barrier()
        return None
    newest: Checkpoint | None = None
    with shared_failure():
        newest = checkpoint.newest_intact(directory) if rank == 0 else None
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

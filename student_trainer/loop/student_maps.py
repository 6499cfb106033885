"""Has each teacher apply the map into the student's shape that calibration fitted (`align.map_at: teacher`).

With the codec `pca`, the map leads on to the principal components of the mapped K/V.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch.distributed as dist

from align.student_map import student_map
from align.teacher_basis import BasisStatistics
from kvcore.plan import CODED
from kvcore.tensors.kv_map import KVMap
from student_trainer.loop import ds_engine
from student_trainer.loop.rank_failures import shared_failure
from student_trainer.loop.teacher_sources import aligner_for, coded, connect_teacher, from_rank_0, use_maps

if TYPE_CHECKING:
    from student_trainer.loop.training_context import TrainingContext
    from student_trainer.model.distill_model import TrainBatch


def lacks_maps(context: TrainingContext) -> bool:
    """Whether teachers are to apply maps that have not been fitted yet."""
    wanted = context.config.align.map_at == "teacher"
    return wanted and any(source.plan.map is None for source in context.sources.values())


def with_student_maps(context: TrainingContext, batches: Iterable[TrainBatch], undo: ExitStack) -> TrainingContext:
    """The context in which every teacher applies its map. All ranks must call it.

    The model's alignments are replaced by ones of the mapped K/V, which are not calibrated yet. The sources that ask
    for whole K/V are closed.

    Args:
        context: its alignments are calibrated.
        batches: this rank's calibration samples with the teachers' whole K/V; read for the codec `pca` alone.
        undo: closes the new sources.

    Raises:
        TeacherRefusedError: a teacher does not take its map.
        StoreError: a store cannot be written, or holds K/V of another map.
    """
    config, model = context.config, context.model
    student, sources = model.aligners[0].student, dict(context.sources)
    fitted = {
        name: from_rank_0(student_map(aligner))
        for (name, source), aligner in zip(sources.items(), model.aligners, strict=True)
        if source.plan.map is None
    }
    if config.kv.codec.name == CODED:
        fitted = _coded(context, fitted, batches)
    maps = {**context.maps, **fitted}
    connect = partial(connect_teacher, config, student, dist.get_rank(), dist.get_world_size(), undo)
    with shared_failure():
        use_maps(config, sources, maps, connect)
    model.aligners = tuple(aligner_for(config, student, source) for source in sources.values())
    return dataclasses.replace(context, sources=sources, maps=maps)


def _coded(context: TrainingContext, maps: Mapping[str, KVMap], batches: Iterable[TrainBatch]) -> dict[str, KVMap]:
    """The maps, each followed by the one to the components of what it makes of the K/V in all ranks' batches."""
    config, device = context.config, ds_engine.device()
    sums = {name: BasisStatistics(one.layers, one.features, device) for name, one in maps.items()}
    with shared_failure():
        for batch in batches:
            for name, kv in zip(context.sources, batch.teachers, strict=True):
                if name in sums:
                    sums[name].update(kv, batch.tokens.text_byte_ends_BT, config.align.sink_tokens)
    for statistics in sums.values():
        for tensor in statistics.tensors():
            dist.all_reduce(tensor)
        statistics.check(1)
    return {
        name: from_rank_0(coded(config, name, statistics, statistics.basis_after(maps[name])))
        for name, statistics in sums.items()
    }

"""Has each teacher apply the map into the student's shape that calibration fitted (`align.map_at: teacher`)."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch.distributed as dist

from align.student_map import student_map
from student_trainer.loop.rank_failures import shared_failure
from student_trainer.loop.teacher_sources import aligner_for, connect_teacher, from_rank_0, use_maps

if TYPE_CHECKING:
    from student_trainer.loop.training_context import TrainingContext


def lacks_maps(context: TrainingContext) -> bool:
    """Whether teachers are to apply maps that have not been fitted yet."""
    wanted = context.config.align.map_at == "teacher"
    return wanted and any(source.plan.map is None for source in context.sources.values())


def with_student_maps(context: TrainingContext, undo: ExitStack) -> TrainingContext:
    """The context in which every teacher applies its map. All ranks must call it.

    The model's alignments are replaced by ones of the mapped K/V, which are not calibrated yet. The sources that ask
    for whole K/V are closed.

    Args:
        context: its alignments are calibrated.
        undo: closes the new sources.

    Raises:
        TeacherRefusedError: a teacher does not take its map.
        StoreError: a store cannot be written, or holds K/V of another map.
    """
    config, model = context.config, context.model
    student, sources, maps = model.aligners[0].student, dict(context.sources), dict(context.maps)
    for (name, source), aligner in zip(sources.items(), model.aligners, strict=True):
        if source.plan.map is None:
            maps[name] = from_rank_0(student_map(aligner))
    connect = partial(connect_teacher, config, student, dist.get_rank(), dist.get_world_size(), undo)
    with shared_failure():
        use_maps(config, sources, maps, connect)
    model.aligners = tuple(aligner_for(config, student, source) for source in sources.values())
    return dataclasses.replace(context, sources=sources, maps=maps)

"""KV sources give the trainer a teacher's K/V. `build_source` composes one teacher's source for one rank."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack

from kvcore.plan import KVPlan
from kvcore.tensors.kv_map import KVMap
from kvcore.types import TeacherInfo
from student_trainer.config import KVConfig, TeacherConfig
from student_trainer.kv_sources.base import KVResult, KVSource, PendingKV, SourceHealth
from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.kv_sources.offline import OfflineSource
from student_trainer.kv_sources.prefetch import Prefetch
from student_trainer.kv_sources.record import Record
from student_trainer.kv_sources.remote import RemoteSource
from student_trainer.kv_sources.shuffled import ShuffledControl

__all__ = ["KVResult", "KVSource", "PendingKV", "SourceHealth", "build_source"]

logger = logging.getLogger(__name__)


def build_source(
    teacher: TeacherConfig,
    kv: KVConfig,
    plan_for: Callable[[TeacherInfo], KVPlan],
    rank: int,
    world_size: int,
    kv_map: KVMap | None = None,
) -> KVSource:
    """One teacher's source for this rank: `Record(Prefetch(Failover([Remote, ...])))` or `Prefetch(Offline)`.

    Args:
        teacher: name and endpoints. Its store is the folder of that name in `kv.store`.
        kv: mode, prefetch, timeouts and control.
        plan_for: makes the plan from the teacher's geometry.
        rank: of this process.
        world_size: number of ranks; they start with different endpoints.
        kv_map: the map that the plan names.

    Raises:
        TeacherUnavailableError: no endpoint answered within `kv.patience_s`.
        TeacherMismatchError: its endpoints serve different teachers.
        StoreError: the store is missing, damaged, or holds another teacher or plan.
        FieldError: `plan_for` cannot make a plan for this teacher.
    """
    with ExitStack() as undo:
        if kv.mode == "offline":
            assert kv.store is not None
            source: KVSource = OfflineSource(kv.store / teacher.name, plan_for)
            undo.callback(source.close)
        else:
            first = rank * len(teacher.endpoints) // world_size
            source = _failover(teacher, kv, plan_for, kv_map, first, undo)
        if kv.prefetch:
            # Training's batches, and those of a validation or calibration beside them.
            source = Prefetch(source, 2 * kv.prefetch)
            undo.callback(source.close)
        if kv.mode == "record":
            assert kv.store is not None
            source = Record(source, kv.store / teacher.name, f"rank{rank}", rank == 0, kv_map)
            undo.callback(source.close)
        if kv.control == "shuffled":
            source = ShuffledControl(source)
        undo.pop_all()
        return source


def _failover(
    teacher: TeacherConfig,
    kv: KVConfig,
    plan_for: Callable[[TeacherInfo], KVPlan],
    kv_map: KVMap | None,
    start: int,
    undo: ExitStack,
) -> FailoverSource:
    remotes = [
        RemoteSource(teacher.name, endpoint, plan_for, kv.request_timeout_s, kv.patience_s, kv_map=kv_map)
        for endpoint in teacher.endpoints
    ]
    waits_once = kv.on_lost == "mask"
    failover = FailoverSource(teacher.name, remotes, kv.patience_s, start, waits_once=waits_once, hedge=kv.hedge)
    undo.callback(failover.close)
    info = failover.connect()
    logger.info("teacher '%s': %s at %s", teacher.name, info.model, ", ".join(teacher.endpoints))
    return failover

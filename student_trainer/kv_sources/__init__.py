"""Where K/V come from. `build_source` makes one teacher's source for one rank out of wrappers around a common core."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack

from kvcore.plan import KVPlan
from kvcore.types import TeacherInfo
from student_trainer.config import KVConfig, TeacherConfig
from student_trainer.kv_sources.base import KVResult, KVSource, SourceHealth, WrappingSource
from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.kv_sources.offline import OfflineSource
from student_trainer.kv_sources.prefetch import Prefetch
from student_trainer.kv_sources.record import Record
from student_trainer.kv_sources.remote import RemoteSource
from student_trainer.kv_sources.shuffled import ShuffledControl

__all__ = ["KVResult", "KVSource", "SourceHealth", "build_source", "counters", "flush", "health", "unshuffled"]

logger = logging.getLogger(__name__)


def build_source(
    teacher: TeacherConfig, kv: KVConfig, plan_for: Callable[[TeacherInfo], KVPlan], rank: int, world_size: int
) -> KVSource:
    """One teacher as this rank sees it: `Record(Prefetch(Failover([Remote, ...])))` or `Prefetch(Offline)`.

    Args:
        teacher: name and endpoints. Its store is the folder of that name in `kv.store`.
        kv: mode, prefetch, timeouts and control.
        plan_for: makes the plan once the teacher's geometry is known.
        rank: of this process.
        world_size: how many ranks there are; they begin with different endpoints.

    Raises:
        TeacherUnavailableError: no endpoint answered within `kv.patience_s`.
        TeacherMismatchError: its endpoints serve different teachers.
        StoreError: the store is missing, damaged, or holds another teacher or plan.
        FieldError: `plan_for` cannot make a plan for this teacher.
    """
    with ExitStack() as undo:
        source = _core(teacher, kv, plan_for, rank * len(teacher.endpoints) // world_size, undo)
        if kv.prefetch:
            source = Prefetch(source, kv.prefetch)
            undo.callback(source.close)
        if kv.mode == "record":
            assert kv.store is not None
            source = Record(source, kv.store / teacher.name, f"rank{rank}", merges_index=rank == 0)
            undo.callback(source.close)
        if kv.control == "shuffled":
            source = ShuffledControl(source)
        undo.pop_all()
        return source


def counters(source: KVSource) -> dict[str, float]:
    """What a source has counted so far: `stall_seconds` in prefetching, `switches` and `retries` in failover."""
    found: dict[str, float] = {}
    for part in _parts(source):
        if isinstance(part, Prefetch):
            found["stall_seconds"] = part.stall_seconds
        elif isinstance(part, FailoverSource):
            found |= {"switches": part.switches, "retries": part.retries}
    return found


def health(source: KVSource) -> SourceHealth | None:
    """How the replicas behind a source do; None where K/V come from a store alone. From any thread."""
    for part in _parts(source):
        if isinstance(part, FailoverSource):
            return part.health()
    return None


def flush(source: KVSource) -> None:
    """Returns when the disk has everything recorded so far; nothing to do for a source that does not record.

    Raises:
        StoreError: the disk did not take it.
    """
    for part in _parts(source):
        if isinstance(part, Record):
            part.flush()


def unshuffled(source: KVSource) -> KVSource:
    """The source that gives every sample its own K/V, whatever the control."""
    return source.source if isinstance(source, ShuffledControl) else source


def _core(
    teacher: TeacherConfig, kv: KVConfig, plan_for: Callable[[TeacherInfo], KVPlan], start: int, undo: ExitStack
) -> KVSource:
    if kv.mode == "offline":
        assert kv.store is not None
        offline = OfflineSource(kv.store / teacher.name, plan_for)
        undo.callback(offline.close)
        return offline
    remotes = [
        RemoteSource(teacher.name, endpoint, plan_for, kv.request_timeout_s, kv.patience_s)
        for endpoint in teacher.endpoints
    ]
    failover = FailoverSource(teacher.name, remotes, kv.patience_s, start)
    undo.callback(failover.close)
    info = failover.connect()
    logger.info("teacher '%s': %s behind %s", teacher.name, info.model, ", ".join(teacher.endpoints))
    return failover


def _parts(source: KVSource) -> list[KVSource]:
    """The source and everything it wraps, outermost first."""
    parts = [source]
    while isinstance(source, WrappingSource):
        source = source.source
        parts.append(source)
    return parts

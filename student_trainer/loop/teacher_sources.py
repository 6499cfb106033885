"""Connects a run to its teachers, and finds the map that each of them applies to its K/V.

A map is a basis of the teacher's own (`align.basis_rank`, and for the codec `pca`), fitted here, or leads into the
student's shape (`align.map_at`), fitted by calibration (`student_maps`).
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch.distributed as dist

from align.aligner import Aligner
from align.head_dim_adapter import KVGeometry
from align.student_map import check_student_map
from align.teacher_basis import BasisStatistics, check_basis
from align.teacher_plan import plan_for
from data.collate import Collator
from data.records import Record
from kvcore.errors import FieldError, TeacherRefusedError
from kvcore.plan import CODED, KVPlan
from kvcore.store.manifest import MANIFEST_NAME, read_manifest, stored_map
from kvcore.tensors.kv_map import KVMap, read_coded_map
from kvcore.types import Sample, TeacherInfo, Tensor
from student_trainer.config import TeacherConfig, TrainConfig
from student_trainer.kv_sources import KVSource, PendingKV, build_source
from student_trainer.kv_sources.kv_batch import decode_and_pad
from student_trainer.loop import ds_engine
from student_trainer.loop.checkpoint import Checkpoint
from student_trainer.loop.rank_failures import shared_failure
from student_trainer.monitoring.phase_progress import show_progress

logger = logging.getLogger(__name__)


# The settings that have teachers apply a map, and the values with which they apply none.
_WITHOUT = {"align.basis_rank": "null", "align.map_at": "'trainer'", "kv.codec.name": "'int8'"}


def map_setting(config: TrainConfig) -> str | None:
    """The setting that has each teacher apply a map; None if there is none."""
    if config.align.basis_rank is not None:
        return "align.basis_rank"
    if config.align.map_at == "teacher":
        return "align.map_at"
    return "kv.codec.name" if config.kv.codec.name == CODED else None


def fits_bases(config: TrainConfig) -> bool:
    """Whether each teacher applies a basis of its own."""
    return map_setting(config) in ("align.basis_rank", "kv.codec.name")


def reading_style(config: TrainConfig, teacher: TeacherConfig) -> str:
    """How a teacher reads samples: `plain` or `chat`."""
    return teacher.format or config.data.format


def samples_of(config: TrainConfig, records: Sequence[Record], style: str) -> list[Sample]:
    """The records as a teacher reads them: as text (`plain`), or in its chat template (`chat`)."""
    if style == "plain":
        return [record.sample() for record in records]
    return [record.sample(record.chat(config.data.system_prompt or "")) for record in records]


def connect_teacher(
    config: TrainConfig,
    geometry: KVGeometry,
    rank: int,
    world_size: int,
    undo: ExitStack,
    teacher: TeacherConfig,
    kv_map: KVMap | None = None,
) -> KVSource:
    """Connects to a teacher, which applies the map to its K/V. `undo` closes the source.

    Raises:
        TeacherRefusedError: the teacher does not offer the selector, or does not support maps.
        FieldError: the teacher has no basis of `align.basis_rank` components, or cannot apply the layer map.
    """
    align, basis_rank = config.align, config.align.basis_rank

    def plan(info: TeacherInfo) -> KVPlan:
        theirs = KVGeometry(info.layers, info.kv_heads, info.head_dim)
        if basis_rank is not None:
            check_basis(basis_rank, theirs, geometry, align.layer_map)
        if align.map_at == "teacher":
            check_student_map(theirs, geometry, align.layer_map)
        whole = plan_for(
            geometry,
            theirs,
            selection=config.kv.selection,
            codec=config.kv.codec.unmapped,
            layer_map=align.layer_map,
            head_adapter=align.head_adapter,
        )
        return whole.with_map(kv_map.named, config.kv.codec.spec) if kv_map else whole

    # Whole K/V are only read to fit a map, and not recorded.
    setting = map_setting(config)
    fits_map = setting is not None and kv_map is None
    kv = config.kv.model_copy(update={"mode": "online"}) if fits_map else config.kv
    source = build_source(teacher, kv, plan, rank, world_size, kv_map)
    undo.callback(source.close)
    info, selector = source.info, config.kv.selection.selector
    if selector not in info.selectors:
        offered = ", ".join(info.selectors)
        raise TeacherRefusedError(teacher.name, f"offers the selectors {offered}, not '{selector}'")
    if setting is not None and fits_map and info.max_map_bytes == 0:
        problem = f"does not support maps ({setting}); upgrade its server, or set {setting} to {_WITHOUT[setting]}"
        raise TeacherRefusedError(teacher.name, problem)
    if rank == 0 and (kv_map is None or kv.mode == "offline"):
        shape = f"{info.layers} layers, {info.kv_heads} KV heads of {info.head_dim}"
        logger.info("teacher '%s': %s, %s", teacher.name, info.model, shape)
    return source


def aligner_for(config: TrainConfig, student: KVGeometry, source: KVSource) -> Aligner:
    """An alignment, not calibrated yet, with what a teacher sends: whole heads, or what its map makes of them."""
    settings = config.align.model_dump(include={"layer_map", "head_adapter", "ridge_rank", "tokens", "sink_tokens"})
    if config.align.map_at == "teacher" and source.plan.map is not None:
        settings |= {"head_adapter": "mapped", "ridge_rank": None}
    theirs = KVGeometry(source.info.layers, *source.plan.decoded_shape(source.info.kv_heads, source.info.head_dim))
    return Aligner(theirs, student, direction=config.direction, **settings).to(ds_engine.device())


def known_maps(config: TrainConfig, student: KVGeometry, resumed: Checkpoint | None) -> dict[str, KVMap]:
    """The maps that are not to be fitted: those of the checkpoint that the run resumes from, and of its stores."""
    maps = resumed.maps() if resumed is not None else {}
    for teacher in config.teachers:
        if teacher.name not in maps and (stored := map_of_store(config, student, teacher)) is not None:
            maps[teacher.name] = stored
    return maps


def teacher_bases(
    config: TrainConfig,
    student: KVGeometry,
    sources: Mapping[str, KVSource],
    resumed: Checkpoint | None,
    collator: Collator,
    records: Sequence[Record],
) -> dict[str, KVMap]:
    """Each teacher's basis, the same on every rank.

    It is that of the checkpoint from which the run resumes, of the store, or of the teacher's `kv_map`, or it is fitted
    to the records.

    Raises:
        FieldError: too few tokens to fit a basis to, or a map of another teacher.
        ConfigError: a `kv_map` cannot be read.
    """
    if resumed is not None:
        maps = resumed.maps()
        for teacher in config.teachers:
            _check_given_map(teacher, sources[teacher.name], maps[teacher.name], "the run's checkpoint")
        return maps
    size = config.run.micro_batch
    batches = [records[at : at + size] for at in range(0, len(records), size)]
    # All teachers that have to be asked work at the same time.
    asked: dict[str, deque[PendingKV]] = {}
    for teacher in config.teachers:
        if sources[teacher.name].plan.map is None and teacher.kv_map is None:
            read = (samples_of(config, part, reading_style(config, teacher)) for part in batches)
            asked[teacher.name] = deque(map(sources[teacher.name].without_control().submit, read))
    maps: dict[str, KVMap] = {}
    for teacher in config.teachers:
        name = teacher.name
        if name in asked:
            maps[name] = _fitted(config, name, sources[name], asked[name], batches, collator)
        else:
            stored = map_of_store(config, student, teacher)
            if stored is not None:
                _check_given_map(teacher, sources[name], stored, "the store")
            maps[name] = stored or _given_map(teacher, sources[name])
    return maps


def _check_given_map(teacher: TeacherConfig, source: KVSource, used: KVMap, where: str) -> None:
    """Checks that a map which is used already is the teacher's `kv_map`, if it has one.

    Raises:
        FieldError: it is another one.
    """
    if teacher.kv_map is not None and _given_map(teacher, source).named != used.named:
        problem = f"{teacher.kv_map} is another map than that of {where}; use the same file, or leave kv_map out"
        raise FieldError(f"teachers: '{teacher.name}': kv_map", problem)


def _given_map(teacher: TeacherConfig, source: KVSource) -> KVMap:
    """The `kv_map` of a teacher, for the layers of the run's plan."""
    assert teacher.kv_map is not None, "without a map, the basis is fitted"
    try:
        kv_map = read_coded_map(teacher.kv_map)
        kv_map.check_teacher(source.info)
        return kv_map.for_layers(source.plan.layers)
    except FieldError as error:
        raise FieldError(f"teachers: '{teacher.name}': kv_map", f"{teacher.kv_map}: {error}") from error


def _fitted(
    config: TrainConfig,
    name: str,
    source: KVSource,
    asked: deque[PendingKV],
    batches: Sequence[Sequence[Record]],
    collator: Collator,
) -> KVMap:
    """A teacher's basis, fitted to the whole K/V of all ranks' batches."""
    device, info = ds_engine.device(), source.info
    whole = (info.kv_heads, info.head_dim)
    features = math.prod(whole)
    rank = config.align.basis_rank or features
    sums = BasisStatistics(source.plan.layers, features, device)
    with shared_failure():
        for records in show_progress(f"finding the basis of {name}", batches):
            kv, _ = decode_and_pad(name, asked.popleft().result(), info, source.plan, None, config.kv.on_missing)
            sums.update(kv.to(device), collator(records).text_byte_ends_BT.to(device), config.align.sink_tokens)
    for tensor in sums.tensors():
        dist.all_reduce(tensor)
    # Without `basis_rank` no component is left out, so their number needs no tokens.
    sums.check(config.align.basis_rank or 1)
    kv_map, kept_LK = sums.basis(rank)
    if dist.get_rank() == 0 and config.align.basis_rank is not None:
        keys, values = kept_LK.mean(dim=0).tolist()
        shares = f"{keys:.2f} of the keys' variance and {values:.2f} of the values'"
        logger.info("teacher '%s': %d of %d components keep %s", name, rank, features, shares)
    if config.kv.codec.name == CODED:
        kv_map = coded(config, name, sums, kv_map, None if config.align.basis_rank else whole)
    return from_rank_0(kv_map)


def coded(
    config: TrainConfig, name: str, sums: BasisStatistics, kv_map: KVMap, whole: tuple[int, int] | None = None
) -> KVMap:
    """A teacher's basis for the codec `pca`, with the quality or the bytes that are set.

    Args:
        config: the run's configuration.
        name: of the teacher.
        sums: of its whole K/V, added up over ranks.
        kv_map: the basis.
        whole: KV heads and head dimension of the teacher, if clients restore its whole heads.
    """
    codec, quality = config.kv.codec, config.kv.codec.target_error
    if codec.bytes_per_token is not None:
        quality = sums.quality_for(kv_map, codec.bytes_per_token)
        if dist.get_rank() == 0:
            wanted = f"{codec.bytes_per_token:g} bytes per token"
            logger.info("teacher '%s': %s give an error of %.3f of what varies", name, wanted, quality)
    return sums.coded(kv_map, quality, whole)


def from_rank_0(kv_map: KVMap) -> KVMap:
    """Rank 0's map: ranks may round differently. All ranks must call it."""
    tensors: dict[str, Tensor] = {}
    device = ds_engine.device()
    for name, tensor in kv_map.tensors.items():
        shared = tensor.to(device).contiguous()
        dist.broadcast(shared, 0)
        tensors[name] = shared.cpu()
    return KVMap(tensors)


def use_maps(
    config: TrainConfig,
    sources: dict[str, KVSource],
    maps: Mapping[str, KVMap],
    connect: Callable[[TeacherConfig, KVMap], KVSource],
) -> None:
    """Replaces the sources that ask for K/V without their teacher's map, if it has one."""
    for teacher in config.teachers:
        kv_map, source = maps.get(teacher.name), sources[teacher.name]
        if kv_map is not None and source.plan.map != kv_map.named:
            source.close()
            sources[teacher.name] = connect(teacher, kv_map)


def map_of_store(config: TrainConfig, student: KVGeometry, teacher: TeacherConfig) -> KVMap | None:
    """The map with which a teacher's K/V were stored; None if there is no store yet, or no map is wanted.

    Raises:
        FieldError: an offline run's store holds whole heads, or K/V of another shape.
        StoreError: the store or its map is damaged.
    """
    setting, rank, kv = map_setting(config), config.align.basis_rank, config.kv
    if setting is None or kv.mode == "online" or kv.store is None:
        return None
    directory = kv.store / teacher.name
    if kv.mode == "record" and not (directory / MANIFEST_NAME).exists():
        return None
    found = stored_map(directory)
    if found is None:
        problem = f"the store {directory} holds whole heads; use {_WITHOUT[setting]}, or record into another kv.store"
        raise FieldError(setting, problem)
    if found.coded != (kv.codec.name == CODED):
        codec = read_manifest(directory).plan.codec.name
        raise FieldError("kv.codec.name", f"got '{kv.codec.name}'; the store {directory} holds K/V in '{codec}'")
    if found.coded and (held := _setting_of(found)) != setting:
        problem = f"the store {directory} was recorded with {held}; record into another kv.store"
        raise FieldError(setting, problem)
    wanted = (student.heads, student.head_dim) if rank is None else (1, rank)
    if setting != "kv.codec.name" and (found.named.heads, found.named.head_dim) != wanted:
        given = f"the student has {student.heads} KV heads of {student.head_dim}" if rank is None else f"got {rank}"
        shape = f"{found.named.heads} heads of {found.named.head_dim}"
        raise FieldError(setting, f"{given}, and the store {directory} holds {shape}")
    return found


def _setting_of(coded_map: KVMap) -> str:
    """The setting of a run that uses this map, as `map_setting` names it."""
    if coded_map.turns_back:
        return "align.map_at"
    return "kv.codec.name" if coded_map.named.restores else "align.basis_rank"

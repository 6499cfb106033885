"""`kvdistill plan`: shows what a run will request from each teacher, in layers and bytes, without training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from align.head_dim_adapter import KVGeometry
from align.student_map import can_map_at_teacher, check_student_map
from align.teacher_basis import can_have_basis, check_basis
from align.teacher_plan import plan_for
from data.records import Record
from extraction.teachers import model_geometry
from kvcore.errors import FieldError, TeacherUnavailableError
from kvcore.models.backbone import read_tokenizer
from kvcore.monitoring.units import in_bytes
from kvcore.plan import CODED, CodecSpec, KVPlan, PlanMap
from kvcore.store.manifest import read_manifest
from kvcore.tensors.plan_size import kept_slots, sample_bytes
from kvdistill.columns import in_columns
from kvdistill.describe import describe, raw_token_bytes
from kvdistill.inspection import plan_codec, plan_layers, plan_tokens
from student_trainer.config import TeacherConfig, TrainConfig
from student_trainer.loop.training_records import train_records

# Records whose tokens are counted, enough for a mean within a few per cent.
MAX_COUNTED = 512
# Numbers of principal components (`align.basis_rank`) whose bytes are shown beside those of all heads.
RANKS = (256, 64, 16)
# Codecs whose bytes are shown beside those of the run's codec.
CODECS = ("int8", "int6", "int4")
# Names of the choices that are shown: all heads, and the student's.
WHOLE, MAPPED = "all heads", "map_at teacher"
_PARTS = ("prompt", "reasoning", "answer")
FLAG = "--teacher-model"


@dataclass(frozen=True, slots=True)
class Lengths:
    """Number of records, and student tokens of prompt, reasoning and answer of some of them."""

    records: int
    counted: Sequence[tuple[int, int, int]]

    def candidates(self, plan: KVPlan) -> list[int]:
        """Tokens that a plan selects from, for each counted record."""
        span = plan.selection.span
        return [sum(parts) if span == "all" else parts[_PARTS.index(span)] for parts in self.counted]

    def text(self) -> float:
        """Mean tokens per text."""
        return fmean(map(sum, self.counted))


@dataclass(frozen=True, slots=True)
class Demand:
    """What a run requests from one teacher. Bytes and tokens are means per sample; the cache is in half precision.

    `bytes_by_choice`: for each codec, and each choice of what the teacher sends that the run can make, by their names.
    """

    teacher: str
    geometry: KVGeometry
    plan: KVPlan
    kept_tokens: float
    sample_bytes: float
    cache_bytes: float
    bytes_by_choice: Mapping[str, Mapping[str, float]]


def plan_text(config: TrainConfig, models: Sequence[str]) -> str:
    """Describes what a run requests from its teachers; stages with equal requests are shown together.

    Args:
        config: the run's configuration.
        models: NAME=PATH of teachers whose model configuration is read instead of asking their servers.

    Raises:
        FieldError: the student, a teacher's model or the alignment is not valid; names the field.
        TeacherUnavailableError: no endpoint of a teacher answers.
        StoreError: an offline run's store is missing or damaged.
    """
    if config.self_teacher:
        raise FieldError("self_teacher", "the student is its own teacher, so nothing is sent")
    if not config.teachers:
        raise FieldError("teachers", "the run has no teachers")
    paths = _paths(models, config)
    student = model_geometry(config.student.path, "student.path")
    geometries = {teacher.name: _geometry(teacher, config, paths) for teacher in config.teachers}
    lengths = _lengths(config)
    head = [
        ("student", f"{config.student.path}: {student.layers} layers, {student.heads} KV heads of {student.head_dim}"),
        ("samples", f"{lengths.records:,}; {lengths.text():.0f} tokens per text (mean of {len(lengths.counted):,})"),
    ]
    stages_of_tables: dict[str, list[str]] = {}
    for name, stage in _stages(config):
        demands = [_demand(teacher, student, stage, geometry, lengths) for teacher, geometry in geometries.items()]
        stages_of_tables.setdefault(_table(stage, demands, lengths.records), []).append(name)
    tables = [
        f"stages  {', '.join(names)}\n{table}" if config.stages else table for table, names in stages_of_tables.items()
    ]
    return "\n\n".join([in_columns(head), *tables])


def _stages(config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    if not config.stages:
        yield "", config
    for index, stage in enumerate(config.stages):
        yield stage.name, config.stage(index)


def _paths(models: Sequence[str], config: TrainConfig) -> dict[str, str]:
    names = [teacher.name for teacher in config.teachers]
    paths: dict[str, str] = {}
    for item in models:
        name, separator, path = item.partition("=")
        if not separator or not path:
            raise FieldError(FLAG, f"expected NAME=PATH, got '{item}'")
        if name not in names:
            raise FieldError(FLAG, f"unknown teacher '{name}'; teachers of the run: {', '.join(names)}")
        paths[name] = path
    return paths


def _geometry(teacher: TeacherConfig, config: TrainConfig, paths: Mapping[str, str]) -> KVGeometry:
    """A teacher's geometry, from its model configuration, its store, or the first endpoint that answers."""
    if teacher.name in paths:
        return model_geometry(paths[teacher.name], FLAG)
    if config.kv.mode == "offline":
        assert config.kv.store is not None, "TrainConfig requires it"
        info = read_manifest(config.kv.store / teacher.name).teacher
        return KVGeometry(info.layers, info.kv_heads, info.head_dim)
    problems: list[str] = []
    for endpoint in teacher.endpoints:
        try:
            info = describe(endpoint)
        except TeacherUnavailableError as error:
            problems.append(f"{endpoint}: {error.problem}")
        else:
            return KVGeometry(info.layers, info.kv_heads, info.head_dim)
    details = "; ".join(problems)
    raise TeacherUnavailableError(
        teacher.name, f"{details}. To plan without its server, add {FLAG} {teacher.name}=PATH_OR_HUB_ID"
    )


def _lengths(config: TrainConfig) -> Lengths:
    try:
        tokenizer: Any = read_tokenizer(config.student.path)
    except (OSError, ValueError) as error:
        raise FieldError("student.path", f"cannot load the tokenizer of '{config.student.path}': {error}") from error
    records = train_records(config.data)
    step = max(1, len(records) // MAX_COUNTED)
    return Lengths(len(records), [_tokens(tokenizer, record) for record in records[::step][:MAX_COUNTED]])


def _tokens(tokenizer: Any, record: Record) -> tuple[int, int, int]:
    prompt, reasoning, answer = (
        len(tokenizer(getattr(record, part), add_special_tokens=part == "prompt")["input_ids"]) for part in _PARTS
    )
    return prompt, reasoning, answer


def _demand(teacher: str, student: KVGeometry, config: TrainConfig, geometry: KVGeometry, lengths: Lengths) -> Demand:
    kv, align = config.kv, config.align
    plan = plan_for(
        student,
        geometry,
        selection=kv.selection,
        codec=kv.codec.unmapped,
        layer_map=align.layer_map,
        head_adapter=align.head_adapter,
    )
    slots = [kept_slots(plan, candidates) for candidates in lengths.candidates(plan)]

    choices = _choices(config, student, geometry)

    def size(codec: CodecSpec, shape: tuple[int, int] | None) -> float:
        named = None if shape is None else PlanMap(digest="0" * 32, heads=shape[0], head_dim=shape[1])
        sized = KVPlan(layers=plan.layers, selection=plan.selection, codec=codec, map=named)
        return fmean(sample_bytes(sized, geometry.heads, geometry.head_dim, count) for count in slots)

    codecs = [plan.codec, *(plan.codec.model_copy(update={"name": name}) for name in CODECS if name != plan.codec.name)]
    by_choice = {codec.name: {name: size(codec, shape) for name, shape in choices.items()} for codec in codecs}
    cache = raw_token_bytes(geometry.layers, geometry.heads, geometry.head_dim) * lengths.text()
    sample = by_choice[plan.codec.name][_chosen(config)]
    if kv.codec.bytes_per_token is not None:
        sample = fmean(slots) * kv.codec.bytes_per_token
    return Demand(teacher, geometry, plan, fmean(slots), sample, cache, by_choice)


def _choices(config: TrainConfig, student: KVGeometry, geometry: KVGeometry) -> dict[str, tuple[int, int] | None]:
    """What a teacher can send, by its name: heads and head dimension, None for all of its own.

    Raises:
        FieldError: the run asks for what this teacher cannot send; names the field.
    """
    align = config.align
    if align.basis_rank is not None:
        check_basis(align.basis_rank, geometry, student, align.layer_map)
    if align.map_at == "teacher":
        check_student_map(geometry, student, align.layer_map)
    choices: dict[str, tuple[int, int] | None] = {WHOLE: None}
    if config.direction == "to_student":
        if can_map_at_teacher(geometry, student, align.layer_map, align.head_adapter):
            choices[MAPPED] = (student.heads, student.head_dim)
    elif can_have_basis(geometry, student, align.layer_map, align.head_adapter):
        ranks = {align.basis_rank or 0, *(rank for rank in RANKS if rank < geometry.features)} - {0}
        choices |= {_components(rank): (1, rank) for rank in sorted(ranks, reverse=True)}
    return choices


def _components(rank: int) -> str:
    return f"basis_rank {rank}"


def _chosen(config: TrainConfig) -> str:
    """The name of what the run's teachers send."""
    if config.align.basis_rank is not None:
        return _components(config.align.basis_rank)
    return MAPPED if config.align.map_at == "teacher" else WHOLE


def _table(config: TrainConfig, demands: Sequence[Demand], records: int) -> str:
    """The requests of a run, and their bytes per sample, step and epoch, and on the network."""
    plan = demands[0].plan
    requests = [("tokens", plan_tokens(plan)), ("codec", plan_codec(plan))]
    if config.kv.codec.bytes_per_token is not None:
        requests[-1] = ("codec", f"{CODED}, {config.kv.codec.bytes_per_token:g} bytes per token")
    elif config.kv.codec.name == CODED:
        at_trainer = config.align.map_at == "trainer"
        hint = ". kvdistill calibrate measures" if at_trainer else ", without entropy coding"
        requests[-1] = ("codec", f"{CODED}; the bytes below are those of {plan.codec.name}{hint}")
    requests += [(f"layers of {each.teacher}", plan_layers(each.plan, each.geometry.layers)) for each in demands]
    requests += [] if config.align.basis_rank is None else [("components", f"{config.align.basis_rank} of each layer")]
    requests += [] if config.align.map_at == "trainer" else [("heads", "the student's (align.map_at teacher)")]
    batch = config.run.global_batch
    rows = [["teacher", "kept tokens", "per sample", "full cache", "reduction", "per step", "per epoch", "at 1 step/s"]]
    rows += [
        [each.teacher, f"{each.kept_tokens:.1f}", *_sizes(each.sample_bytes, each.cache_bytes, batch, records)]
        for each in demands
    ]
    if len(demands) > 1:
        samples, caches = (sum(getattr(each, name) for each in demands) for name in ("sample_bytes", "cache_bytes"))
        rows.append(["all", "", *_sizes(samples, caches, batch, records)])
    return "\n\n".join([in_columns(requests), _choice_table(demands), in_columns(rows, right=True)])


def _choice_table(demands: Sequence[Demand]) -> str:
    """A table of the bytes per sample by codec and by what the teachers send."""
    by_codec = demands[0].bytes_by_choice
    most = {name: size for each in demands for name, size in next(iter(each.bytes_by_choice.values())).items()}
    names = sorted(most, key=lambda name: -most[name])
    rows = [["per sample", "full cache", "codec", *names]]
    for each in demands:
        for codec in by_codec:
            sizes = [each.bytes_by_choice[codec].get(name) for name in names]
            shown = ["-" if size is None else in_bytes(round(size)) for size in sizes]
            rows.append([each.teacher, in_bytes(round(each.cache_bytes)), codec, *shown])
    return in_columns(rows, right=True)


def _sizes(sample: float, cache: float, batch: int, records: int) -> list[str]:
    """Table cells of bytes per sample, step and epoch, and of bandwidth."""
    return [
        in_bytes(round(sample)),
        in_bytes(round(cache)),
        f"{cache / sample:.1f}x" if sample else "-",
        in_bytes(round(sample * batch)),
        in_bytes(round(sample * records)),
        f"{sample * batch * 8 / 1e9:.3f} Gbit/s",
    ]

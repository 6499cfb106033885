"""Converts requests, plans and teacher descriptions between protobuf and kvcore's types.

Everything received is checked here. A wrong value raises a `FieldError` with the path of the protobuf field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar, cast, get_args

import xxhash

from kvcore.config import parse
from kvcore.errors import FieldError, ProtocolError
from kvcore.plan import ImportancePool, KVPlan, SamplingParams, Scope, SelectionSpan, SpanKind
from kvcore.types import ROLES, Chat, Role, Sample, Span, TeacherInfo, Turn
from kvcore.wire.description_limits import check_description
from protos import kv_cache_pb2 as pb

NameT = TypeVar("NameT", bound=str)

# Initial metadata of every StreamKV answer: the teacher that it comes from. The teacher at an address may change.
TEACHER_METADATA = "kvdistill-teacher"

_SPAN_NUMBERS: dict[SelectionSpan, pb.SpanKind] = {
    "prompt": pb.SPAN_KIND_PROMPT,
    "reasoning": pb.SPAN_KIND_REASONING,
    "answer": pb.SPAN_KIND_ANSWER,
    "all": pb.SPAN_KIND_ALL,
}
_SCOPE_NUMBERS: dict[Scope, pb.Scope] = {
    "head": pb.SCOPE_HEAD,
    "layer": pb.SCOPE_LAYER,
    "sample": pb.SCOPE_SAMPLE,
}
_POOL_NUMBERS: dict[ImportancePool, pb.ImportancePool] = {
    "max": pb.IMPORTANCE_POOL_MAX,
    "mean": pb.IMPORTANCE_POOL_MEAN,
}
_SPANS: dict[int, SelectionSpan] = {number: name for name, number in _SPAN_NUMBERS.items()}
_SCOPES: dict[int, Scope] = {number: name for name, number in _SCOPE_NUMBERS.items()}
_ROLES: dict[str, Role] = {role: role for role in ROLES}
_POOLS: dict[int, ImportancePool] = {number: name for name, number in _POOL_NUMBERS.items()}


def plan_to_proto(plan: KVPlan) -> pb.Plan:
    """Writes a plan with every field, including defaults, so that both sides compute the same digest."""
    selection, codec = plan.selection, plan.codec
    return pb.Plan(
        layers=plan.layers,
        selection=pb.Selection(
            selector=selection.selector,
            budget=selection.budget,
            span=_SPAN_NUMBERS[selection.span],
            scope=_SCOPE_NUMBERS[selection.scope],
            importance_weight=selection.importance_weight,
            importance_pool=_POOL_NUMBERS[selection.importance_pool],
            seed=selection.seed,
        ),
        codec=pb.Codec(name=codec.name, group_size=codec.group_size, max_relative_error=codec.max_relative_error),
        map=None if plan.map is None else pb.PlanMap(**plan.map.model_dump()),
    )


def plan_from_proto(proto: pb.Plan, field: str = "plan") -> KVPlan:
    """Reads a plan.

    Raises:
        FieldError: such as `plan.selection.budget: Input should be greater than or equal to 0 (got -1)`.
    """
    codec: dict[str, Any] = {"name": proto.codec.name}
    if proto.codec.HasField("group_size"):
        codec["group_size"] = proto.codec.group_size
    if proto.codec.HasField("max_relative_error"):
        codec["max_relative_error"] = _finite(proto.codec.max_relative_error, f"{field}.codec.max_relative_error")
    tree: dict[str, Any] = {
        "layers": list(proto.layers),
        "selection": _selection_tree(proto.selection, f"{field}.selection"),
        "codec": codec,
    }
    if proto.HasField("map"):
        named = proto.map
        tree["map"] = {"digest": named.digest, "heads": named.heads, "head_dim": named.head_dim}
        tree["map"]["restores"] = named.restores
    try:
        return parse(tree, KVPlan)
    except FieldError as error:
        raise _under(field, error) from error


def _selection_tree(proto: pb.Selection, field: str) -> dict[str, Any]:
    """The fields that a request sets; absent fields take the defaults of `Selection`."""
    selection: dict[str, Any] = {
        "selector": proto.selector,
        "budget": proto.budget,
        "span": _named(proto.span, _SPANS, f"{field}.span"),
        "scope": _named(proto.scope, _SCOPES, f"{field}.scope"),
    }
    if proto.HasField("importance_weight"):
        selection["importance_weight"] = _finite(proto.importance_weight, f"{field}.importance_weight")
    if proto.HasField("importance_pool"):
        selection["importance_pool"] = _named(proto.importance_pool, _POOLS, f"{field}.importance_pool")
    if proto.HasField("seed"):
        selection["seed"] = proto.seed
    return selection


def sampling_to_proto(sampling: SamplingParams) -> pb.Sampling:
    """Writes sampling parameters with every field."""
    return pb.Sampling(**sampling.model_dump())


def sampling_from_proto(proto: pb.Sampling, field: str = "sampling") -> SamplingParams:
    """Reads sampling parameters.

    Raises:
        FieldError: such as `sampling.top_p: Input should be less than or equal to 1 (got 2.0)`.
    """
    tree: dict[str, Any] = {
        "max_new_tokens": proto.max_new_tokens,
        "temperature": _finite(proto.temperature, f"{field}.temperature"),
        "seed": proto.seed,
        "stop": list(proto.stop),
        "answer_marker": proto.answer_marker,
    }
    if proto.HasField("top_p"):
        tree["top_p"] = _finite(proto.top_p, f"{field}.top_p")
    try:
        return parse(tree, SamplingParams)
    except FieldError as error:
        raise FieldError(f"{field}.{error.field}", error.problem) from error


def sample_to_proto(sample: Sample) -> pb.Sample:
    """Writes a sample.

    Raises:
        FieldError: the text holds lone surrogates, which UTF-8 cannot encode.
    """
    spans = [pb.Span(kind=_SPAN_NUMBERS[span.kind], start=span.start, end=span.end) for span in sample.spans]
    chat = None if sample.chat is None else _chat_to_proto(sample.chat)
    if sample.token_ids is not None:
        return pb.Sample(id=sample.id, token_ids=pb.TokenIds(ids=sample.token_ids), spans=spans)
    assert sample.text is not None
    try:
        sample.text.encode()
    except UnicodeEncodeError as error:
        raise FieldError("text", f"sample '{sample.id}' is not valid Unicode: {error}") from error
    return pb.Sample(id=sample.id, text=sample.text, spans=spans, chat=chat)


def sample_from_proto(proto: pb.Sample, field: str = "sample") -> Sample:
    """Reads a sample; `field` is its path in the request, such as `samples.3`.

    Raises:
        FieldError: no id, no content, a negative token id, a span or turn that is outside the content or overlaps
            another, or turns of token ids.
    """
    if not proto.id:
        raise FieldError(f"{field}.id", "is empty; every sample needs an id")
    content = proto.WhichOneof("content")
    if content is None:
        raise FieldError(field, "has neither text nor token_ids")
    if content == "text":
        if not proto.text:
            raise FieldError(f"{field}.text", "is empty")
        spans, chat = _spans(proto, len(proto.text), field), _chat_from_proto(proto, f"{field}.chat")
        return Sample(proto.id, text=proto.text, spans=spans, chat=chat)
    if proto.HasField("chat"):
        raise FieldError(f"{field}.chat", "a chat template needs text, but the sample has token_ids")
    token_ids = tuple(proto.token_ids.ids)
    if not token_ids:
        raise FieldError(f"{field}.token_ids.ids", "is empty")
    if min(token_ids) < 0:
        at = next(at for at, token in enumerate(token_ids) if token < 0)
        raise FieldError(f"{field}.token_ids.ids.{at}", f"must be at least 0 (got {token_ids[at]})")
    return Sample(proto.id, token_ids=token_ids, spans=_spans(proto, len(token_ids), field))


def info_to_proto(info: TeacherInfo) -> pb.DescribeResponse:
    """Writes a teacher's description, with its hash."""
    proto = pb.DescribeResponse(
        model=info.model,
        weights_digest=info.weights_digest,
        tokenizer_fingerprint=info.tokenizer_fingerprint,
        layers=info.layers,
        kv_heads=info.kv_heads,
        head_dim=info.head_dim,
        rope_json=json.dumps(dict(info.rope), sort_keys=True),
        engine=info.engine,
        dtype=info.dtype,
        limits=pb.Limits(
            max_sample_tokens=info.max_sample_tokens,
            max_samples_per_request=info.max_samples_per_request,
            max_frame_bytes=info.max_frame_bytes,
            max_map_bytes=info.max_map_bytes,
        ),
        selectors=info.selectors,
        codecs=info.codecs,
    )
    proto.xxh3 = _description_hash(proto)
    return proto


def info_from_proto(proto: pb.DescribeResponse) -> TeacherInfo:
    """Reads a teacher's description.

    Raises:
        ProtocolError: the description does not match its hash.
        FieldError: an identity is missing, a size is not positive or implausibly large, a text has control characters,
            or `rope_json` is not a JSON object.
    """
    if proto.xxh3 != _description_hash(proto):
        raise ProtocolError("the teacher's description does not match its xxh3")
    check_description(proto)
    for name in ("weights_digest", "tokenizer_fingerprint"):
        if not getattr(proto, name):
            raise FieldError(name, "is empty; a teacher must identify itself")
    limits = proto.limits
    return TeacherInfo(
        model=proto.model,
        weights_digest=proto.weights_digest,
        tokenizer_fingerprint=proto.tokenizer_fingerprint,
        layers=_positive(proto.layers, "layers"),
        kv_heads=_positive(proto.kv_heads, "kv_heads"),
        head_dim=_positive(proto.head_dim, "head_dim"),
        rope=_json_object(proto.rope_json, "rope_json"),
        engine=proto.engine,
        dtype=proto.dtype,
        max_sample_tokens=_positive(limits.max_sample_tokens, "limits.max_sample_tokens"),
        max_samples_per_request=_positive(limits.max_samples_per_request, "limits.max_samples_per_request"),
        max_frame_bytes=_positive(limits.max_frame_bytes, "limits.max_frame_bytes"),
        selectors=tuple(proto.selectors),
        codecs=tuple(proto.codecs),
        max_map_bytes=_at_least(0, limits.max_map_bytes, "limits.max_map_bytes"),
    )


def teacher_metadata(info: TeacherInfo) -> str:
    """The value of `TEACHER_METADATA`: equal for replicas of one teacher."""
    return f"{info.weights_digest}.{info.tokenizer_fingerprint}"


def _description_hash(proto: pb.DescribeResponse) -> int:
    content = pb.DescribeResponse()
    content.CopyFrom(proto)
    content.ClearField("xxh3")
    return xxhash.xxh3_64_intdigest(content.SerializeToString(deterministic=True))


def _spans(proto: pb.Sample, length: int, field: str) -> tuple[Span, ...]:
    spans: list[Span] = []
    for at, span in enumerate(proto.spans):
        where = f"{field}.spans.{at}"
        kind = _named(span.kind, _SPANS, f"{where}.kind")
        if kind == "all":
            raise FieldError(f"{where}.kind", f"must be one of {', '.join(get_args(SpanKind))} (got all)")
        if not 0 <= span.start <= length:
            raise FieldError(
                f"{where}.start", f"must be between 0 and the content's length {length} (got {span.start})"
            )
        if not span.start <= span.end <= length:
            raise FieldError(
                f"{where}.end", f"must be between the start {span.start} and the length {length} (got {span.end})"
            )
        spans.append(Span(kind, span.start, span.end))
    _check_overlaps(spans, field)
    return tuple(spans)


def _chat_to_proto(chat: Chat) -> pb.Chat:
    turns = [pb.Turn(role=turn.role, start=turn.start, end=turn.end) for turn in chat.turns]
    return pb.Chat(turns=turns, system_prompt=chat.system_prompt)


def _chat_from_proto(proto: pb.Sample, field: str) -> Chat | None:
    if not proto.HasField("chat"):
        return None
    turns: list[Turn] = []
    reached = 0
    for at, turn in enumerate(proto.chat.turns):
        where = f"{field}.turns.{at}"
        role = _ROLES.get(turn.role)
        if role is None or (role == "system" and at > 0):
            raise FieldError(f"{where}.role", f"must be system (only first), user or assistant (got '{turn.role}')")
        if not reached <= turn.start <= turn.end <= len(proto.text):
            raise FieldError(
                where,
                f"must lie between the end of the turn before, {reached}, and the text's length {len(proto.text)} "
                f"(got {turn.start} to {turn.end})",
            )
        turns.append(Turn(role, turn.start, turn.end))
        reached = turn.end
    if not turns:
        raise FieldError(f"{field}.turns", "is empty; a chat has at least one turn")
    return Chat(tuple(turns), proto.chat.system_prompt)


def _check_overlaps(spans: Sequence[Span], field: str) -> None:
    """Checks spans in order of their start: a span that overlaps an earlier one also overlaps its neighbour."""
    filled = (place for place, span in enumerate(spans) if span.start < span.end)
    for first, second in pairwise(sorted(filled, key=lambda place: spans[place].start)):
        if spans[second].start < spans[first].end:
            before, after = sorted((first, second))
            one, other = spans[after], spans[before]
            both = f"[{one.start}, {one.end}) overlaps spans.{before} [{other.start}, {other.end})"
            raise FieldError(f"{field}.spans.{after}", both)


def _named(number: int, names: Mapping[int, NameT], field: str) -> NameT:
    name = names.get(number)
    if name is None:
        known = ", ".join(f"{number} ({name})" for number, name in names.items())
        raise FieldError(field, f"must be one of {known} (got {number})")
    return name


def _finite(value: float, field: str) -> float:
    if not math.isfinite(value):
        raise FieldError(field, f"must be a finite number (got {value})")
    return value


def _positive(value: int, field: str) -> int:
    return _at_least(1, value, field)


def _at_least(least: int, value: int, field: str) -> int:
    if value < least:
        raise FieldError(field, f"must be at least {least} (got {value})")
    return value


def _json_object(text: str, field: str) -> dict[str, Any]:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FieldError(field, f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FieldError(field, f"must be a JSON object (got a {type(value).__name__})")
    return cast("dict[str, Any]", value)


def _under(prefix: str, error: FieldError) -> FieldError:
    """Prefixes an error's field with its path."""
    return FieldError(f"{prefix}.{error.field}", error.problem)

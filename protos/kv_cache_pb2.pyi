from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SpanKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SPAN_KIND_UNSPECIFIED: _ClassVar[SpanKind]
    SPAN_KIND_PROMPT: _ClassVar[SpanKind]
    SPAN_KIND_REASONING: _ClassVar[SpanKind]
    SPAN_KIND_ANSWER: _ClassVar[SpanKind]
    SPAN_KIND_ALL: _ClassVar[SpanKind]

class ImportancePool(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMPORTANCE_POOL_UNSPECIFIED: _ClassVar[ImportancePool]
    IMPORTANCE_POOL_MAX: _ClassVar[ImportancePool]
    IMPORTANCE_POOL_MEAN: _ClassVar[ImportancePool]

class Scope(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCOPE_UNSPECIFIED: _ClassVar[Scope]
    SCOPE_HEAD: _ClassVar[Scope]
    SCOPE_LAYER: _ClassVar[Scope]
    SCOPE_SAMPLE: _ClassVar[Scope]
SPAN_KIND_UNSPECIFIED: SpanKind
SPAN_KIND_PROMPT: SpanKind
SPAN_KIND_REASONING: SpanKind
SPAN_KIND_ANSWER: SpanKind
SPAN_KIND_ALL: SpanKind
IMPORTANCE_POOL_UNSPECIFIED: ImportancePool
IMPORTANCE_POOL_MAX: ImportancePool
IMPORTANCE_POOL_MEAN: ImportancePool
SCOPE_UNSPECIFIED: Scope
SCOPE_HEAD: Scope
SCOPE_LAYER: Scope
SCOPE_SAMPLE: Scope

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("model", "weights_digest", "tokenizer_fingerprint", "layers", "kv_heads", "head_dim", "rope_json", "engine", "dtype", "limits", "selectors", "codecs", "xxh3")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    ROPE_JSON_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SELECTORS_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    XXH3_FIELD_NUMBER: _ClassVar[int]
    model: str
    weights_digest: str
    tokenizer_fingerprint: str
    layers: int
    kv_heads: int
    head_dim: int
    rope_json: str
    engine: str
    dtype: str
    limits: Limits
    selectors: _containers.RepeatedScalarFieldContainer[str]
    codecs: _containers.RepeatedScalarFieldContainer[str]
    xxh3: int
    def __init__(self, model: _Optional[str] = ..., weights_digest: _Optional[str] = ..., tokenizer_fingerprint: _Optional[str] = ..., layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., rope_json: _Optional[str] = ..., engine: _Optional[str] = ..., dtype: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., selectors: _Optional[_Iterable[str]] = ..., codecs: _Optional[_Iterable[str]] = ..., xxh3: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_sample_tokens", "max_samples_per_request", "max_frame_bytes", "max_map_bytes")
    MAX_SAMPLE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_SAMPLES_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_MAP_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_sample_tokens: int
    max_samples_per_request: int
    max_frame_bytes: int
    max_map_bytes: int
    def __init__(self, max_sample_tokens: _Optional[int] = ..., max_samples_per_request: _Optional[int] = ..., max_frame_bytes: _Optional[int] = ..., max_map_bytes: _Optional[int] = ...) -> None: ...

class LoadMapRequest(_message.Message):
    __slots__ = ("digest", "size", "data")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    digest: str
    size: int
    data: bytes
    def __init__(self, digest: _Optional[str] = ..., size: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class LoadMapResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenMemoryRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenMemoryResponse(_message.Message):
    __slots__ = ("problem", "pid", "fd", "name", "slots", "slot_bytes")
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    problem: str
    pid: int
    fd: int
    name: str
    slots: int
    slot_bytes: int
    def __init__(self, problem: _Optional[str] = ..., pid: _Optional[int] = ..., fd: _Optional[int] = ..., name: _Optional[str] = ..., slots: _Optional[int] = ..., slot_bytes: _Optional[int] = ...) -> None: ...

class KVRequest(_message.Message):
    __slots__ = ("request_id", "plan", "samples")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    plan: Plan
    samples: _containers.RepeatedCompositeFieldContainer[Sample]
    def __init__(self, request_id: _Optional[str] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., samples: _Optional[_Iterable[_Union[Sample, _Mapping]]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "plan", "samples", "sampling")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    plan: Plan
    samples: _containers.RepeatedCompositeFieldContainer[Sample]
    sampling: Sampling
    def __init__(self, request_id: _Optional[str] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., samples: _Optional[_Iterable[_Union[Sample, _Mapping]]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_new_tokens", "temperature", "top_p", "seed", "stop", "answer_marker")
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    ANSWER_MARKER_FIELD_NUMBER: _ClassVar[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    answer_marker: str
    def __init__(self, max_new_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., answer_marker: _Optional[str] = ...) -> None: ...

class Sample(_message.Message):
    __slots__ = ("id", "text", "token_ids", "spans", "chat")
    ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    id: str
    text: str
    token_ids: TokenIds
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    chat: Chat
    def __init__(self, id: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("turns", "system_prompt")
    TURNS_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_PROMPT_FIELD_NUMBER: _ClassVar[int]
    turns: _containers.RepeatedCompositeFieldContainer[Turn]
    system_prompt: str
    def __init__(self, turns: _Optional[_Iterable[_Union[Turn, _Mapping]]] = ..., system_prompt: _Optional[str] = ...) -> None: ...

class Turn(_message.Message):
    __slots__ = ("role", "start", "end")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    role: str
    start: int
    end: int
    def __init__(self, role: _Optional[str] = ..., start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("kind", "start", "end")
    KIND_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    kind: SpanKind
    start: int
    end: int
    def __init__(self, kind: _Optional[_Union[SpanKind, str]] = ..., start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("layers", "selection", "codec", "map")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    MAP_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedScalarFieldContainer[int]
    selection: Selection
    codec: Codec
    map: PlanMap
    def __init__(self, layers: _Optional[_Iterable[int]] = ..., selection: _Optional[_Union[Selection, _Mapping]] = ..., codec: _Optional[_Union[Codec, _Mapping]] = ..., map: _Optional[_Union[PlanMap, _Mapping]] = ...) -> None: ...

class PlanMap(_message.Message):
    __slots__ = ("digest", "heads", "head_dim", "restores")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    RESTORES_FIELD_NUMBER: _ClassVar[int]
    digest: str
    heads: int
    head_dim: int
    restores: bool
    def __init__(self, digest: _Optional[str] = ..., heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., restores: _Optional[bool] = ...) -> None: ...

class Selection(_message.Message):
    __slots__ = ("selector", "budget", "span", "scope", "importance_weight", "importance_pool", "seed")
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    SPAN_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    IMPORTANCE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    IMPORTANCE_POOL_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    selector: str
    budget: int
    span: SpanKind
    scope: Scope
    importance_weight: float
    importance_pool: ImportancePool
    seed: int
    def __init__(self, selector: _Optional[str] = ..., budget: _Optional[int] = ..., span: _Optional[_Union[SpanKind, str]] = ..., scope: _Optional[_Union[Scope, str]] = ..., importance_weight: _Optional[float] = ..., importance_pool: _Optional[_Union[ImportancePool, str]] = ..., seed: _Optional[int] = ...) -> None: ...

class Codec(_message.Message):
    __slots__ = ("name", "group_size", "max_relative_error")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_RELATIVE_ERROR_FIELD_NUMBER: _ClassVar[int]
    name: str
    group_size: int
    max_relative_error: float
    def __init__(self, name: _Optional[str] = ..., group_size: _Optional[int] = ..., max_relative_error: _Optional[float] = ...) -> None: ...

class KVFrame(_message.Message):
    __slots__ = ("header", "body", "header_xxh3", "shared_body")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    HEADER_XXH3_FIELD_NUMBER: _ClassVar[int]
    SHARED_BODY_FIELD_NUMBER: _ClassVar[int]
    header: bytes
    body: bytes
    header_xxh3: int
    shared_body: SharedBody
    def __init__(self, header: _Optional[bytes] = ..., body: _Optional[bytes] = ..., header_xxh3: _Optional[int] = ..., shared_body: _Optional[_Union[SharedBody, _Mapping]] = ...) -> None: ...

class SharedBody(_message.Message):
    __slots__ = ("slot", "generation", "size")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    slot: int
    generation: int
    size: int
    def __init__(self, slot: _Optional[int] = ..., generation: _Optional[int] = ..., size: _Optional[int] = ...) -> None: ...

"""The plan: what a student asks of a teacher's K/V, executed at the source; and how a teacher writes. Free of torch."""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kvcore.config import StrictModel
from kvcore.plugins import NameTable

SELECTORS = NameTable(
    "selector",
    "kvdistill.selectors",
    {
        "full": "kvcore.tensors.selectors.full:FULL",
        "right": "kvcore.tensors.selectors.right:RIGHT",
        "r_kv": "kvcore.tensors.selectors.r_kv:R_KV",
        "uniform": "kvcore.tensors.selectors.uniform:UNIFORM",
        "random": "kvcore.tensors.selectors.random:RANDOM",
        "keydiff": "kvcore.tensors.selectors.keydiff:KEYDIFF",
    },
)
CODECS = NameTable(
    "codec",
    "kvdistill.codecs",
    {"raw": "kvcore.tensors.codec:RAW", "bf16": "kvcore.tensors.codec:BF16", "int8": "kvcore.tensors.codec:INT8"},
)
Selector = Annotated[str, SELECTORS]
CodecName = Annotated[str, CODECS]
SpanKind = Literal["prompt", "reasoning", "answer"]
SelectionSpan = Literal["prompt", "reasoning", "answer", "all"]
Scope = Literal["head", "layer", "sample"]
ImportancePool = Literal["max", "mean"]

# The names that commands take for `kv_compression`.
COMPRESSIONS: dict[str, str] = {"full": "full", "right": "right", "r-kv": "r_kv"}


class Selection(StrictModel):
    """Which tokens leave the teacher.

    `budget` is the most tokens kept, 0 for `full`. `scope` says who chooses: each `head`, each `layer`
    (its heads together) or the whole `sample`. Of R-KV (arXiv 2505.24133, 2510.02312): `importance_weight` is its
    lambda, `importance_pool` what stands for the query heads that share a KV head. `seed`: of the selector `random`.
    """

    selector: Selector = "full"
    budget: Annotated[int, Field(ge=0)] = 0
    span: SelectionSpan = "reasoning"
    scope: Scope = "sample"
    importance_weight: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    importance_pool: ImportancePool = "max"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _budget_fits_selector(self) -> Self:
        if self.selector == "full" and self.budget != 0:
            raise ValueError(f"budget: the selector 'full' keeps all tokens, so it takes no budget; got {self.budget}")
        if self.selector != "full" and self.budget == 0:
            raise ValueError(f"budget: the selector '{self.selector}' needs a budget of at least 1")
        return self


class CodecSpec(StrictModel):
    """How tensors are packed. `group_size`: elements that share a scale in the quantising codecs."""

    name: CodecName = "int8"
    group_size: Annotated[int, Field(ge=1, le=4096)] = 64
    max_relative_error: Annotated[float, Field(gt=0.0)] | None = None


class KVPlan(StrictModel):
    """The whole request of a student to one teacher, for every sample alike."""

    layers: tuple[Annotated[int, Field(ge=0)], ...]
    selection: Selection = Selection()
    codec: CodecSpec = CodecSpec()
    keys: bool = True
    values: bool = True

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers: need at least one, ascending and without repeats; got {list(self.layers)}")
        if not (self.keys or self.values):
            raise ValueError("keys: a plan without keys and without values asks for nothing")
        return self

    def digest(self) -> str:
        """Canonical hash: equal plans give equal digests, whatever the order or defaults they were written in."""
        return _digest(self)  # pyright: ignore[reportArgumentType]  frozen models have a hash


class SamplingParams(StrictModel):
    """How a teacher writes on from a prompt.

    `temperature` 0 writes the likeliest token each time (greedy); otherwise tokens are drawn, from the smallest set
    whose probabilities reach `top_p`, by `seed` and the prompt alone. `stop`: texts that end the writing and are no
    part of it. `answer_marker`: the reasoning ends with its first occurrence, and what follows is the answer; without
    one all is reasoning.
    """

    max_new_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    stop: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=256)], ...], Field(max_length=16)] = ()
    answer_marker: Annotated[str, Field(max_length=256)] = ""

    def digest(self) -> str:
        """Canonical hash, like `KVPlan.digest`."""
        return _digest(self)  # pyright: ignore[reportArgumentType]  frozen models have a hash


# Asked for with every sample's content key, of the one or two plans that a process uses.
@functools.lru_cache(maxsize=64)
def _digest(model: KVPlan | SamplingParams) -> str:
    canonical = json.dumps(model.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

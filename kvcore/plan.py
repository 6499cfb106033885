"""The KV plan that a student sends to a teacher, and the sampling parameters of generation. Imports no torch."""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kvcore.config import Fraction, NonNegativeInt, PositiveFloat, StrictModel
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


class Selection(StrictModel):
    """The tokens whose K/V the teacher sends."""

    selector: Selector = "full"
    """How tokens are selected. `full`: all; `right`: the last ones; `r_kv`: by importance and redundancy (R-KV, arXiv
    2505.24133 and 2510.02312); `uniform`: evenly spaced; `random`: drawn from `seed`; `keydiff`: the keys that differ
    most from the mean key."""
    budget: NonNegativeInt = 0
    """Maximum number of tokens kept. Must be 0 for `full`."""
    span: SelectionSpan = "reasoning"
    """Part of the text from which tokens are selected."""
    scope: Scope = "sample"
    """Whether each `head`, each `layer` (all its heads together) or the whole `sample` selects its own tokens."""
    importance_weight: Fraction = 0.1
    """R-KV's lambda: the weight of importance against redundancy."""
    importance_pool: ImportancePool = "max"
    """How R-KV combines the scores of the query heads that share a KV head."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the selector `random`."""

    @model_validator(mode="after")
    def _budget_fits_selector(self) -> Self:
        if self.selector == "full" and self.budget != 0:
            raise ValueError(f"budget: the selector 'full' keeps all tokens, so it takes no budget; got {self.budget}")
        if self.selector != "full" and self.budget == 0:
            raise ValueError(f"budget: the selector '{self.selector}' needs a budget of at least 1")
        return self


class CodecSpec(StrictModel):
    """How K/V are encoded for transfer and storage."""

    name: CodecName = "int8"
    """Codec: `raw` (fp32), `bf16`, or `int8` with one scale per group."""
    group_size: Annotated[int, Field(ge=1, le=4096)] = 64
    """Number of elements that share a scale in quantising codecs."""
    max_relative_error: PositiveFloat | None = None
    """Largest relative error accepted for a layer. A sample above it fails. No limit by default."""


class KVPlan(StrictModel):
    """What a student requests from a teacher, the same for every sample."""

    layers: tuple[NonNegativeInt, ...]
    """Teacher layers, ascending."""
    selection: Selection = Selection()
    """The tokens to send."""
    codec: CodecSpec = CodecSpec()
    """How K/V are encoded."""

    @model_validator(mode="after")
    def _layers_ascend(self) -> Self:
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers: expected at least one, ascending and without repeats; got {list(self.layers)}")
        return self

    def digest(self) -> str:
        """Canonical hash. Equal plans have equal digests, independent of key order and omitted defaults."""
        return _digest(self)  # pyright: ignore[reportArgumentType]  frozen models have a hash


class SamplingParams(StrictModel):
    """How a teacher generates text after a prompt."""

    max_new_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    """Maximum number of tokens to generate."""
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """Softmax temperature. 0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Tokens are drawn from the smallest set whose probabilities reach this sum."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Together with the prompt, the seed alone decides what is drawn."""
    stop: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=256)], ...], Field(max_length=16)] = ()
    """Texts that end the generation. They are not part of the result."""
    answer_marker: Annotated[str, Field(max_length=256)] = ""
    """Text whose first occurrence ends the reasoning; the answer follows it. If empty, all generated text is
    reasoning."""

    def digest(self) -> str:
        """Canonical hash, like `KVPlan.digest`."""
        return _digest(self)  # pyright: ignore[reportArgumentType]  frozen models have a hash


# Cached because every sample key needs it, and a process uses only one or two plans.
@functools.lru_cache(maxsize=64)
def _digest(model: KVPlan | SamplingParams) -> str:
    canonical = json.dumps(model.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

"""The KV plan that a student sends to a teacher, and the sampling parameters of generation. Imports no torch."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kvcore.config import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, StrictModel
from kvcore.plugins import NameTable

SELECTORS = NameTable(
    "selector",
    "kvdistill.selectors",
    {
        "full": "kvcore.tensors.selectors.full:FULL",
        "right": "kvcore.tensors.selectors.right:RIGHT",
        "r_kv": "kvcore.tensors.selectors.r_kv:R_KV",
        "r_kv_centred": "kvcore.tensors.selectors.r_kv:R_KV_CENTRED",
        "uniform": "kvcore.tensors.selectors.uniform:UNIFORM",
        "random": "kvcore.tensors.selectors.random:RANDOM",
        "keydiff": "kvcore.tensors.selectors.keydiff:KEYDIFF",
    },
)
CODECS = NameTable(
    "codec",
    "kvdistill.codecs",
    {
        "raw": "kvcore.tensors.codec:RAW",
        "bf16": "kvcore.tensors.codec:BF16",
        "int8": "kvcore.tensors.codec:INT8",
        "int6": "kvcore.tensors.packed_codec:INT6",
        "int4": "kvcore.tensors.packed_codec:INT4",
        "pca": "kvcore.tensors.codec:PCA",
    },
)
# The codec of coded maps (kvcore/tensors/kv_map.py).
CODED = "pca"
Selector = Annotated[str, SELECTORS]
CodecName = Annotated[str, CODECS]
SpanKind = Literal["prompt", "reasoning", "answer"]
SelectionSpan = Literal["prompt", "reasoning", "answer", "all"]
Scope = Literal["head", "layer", "sample"]
ImportancePool = Literal["max", "mean"]


class Selection(StrictModel):
    """The tokens whose K/V the teacher sends."""

    selector: Selector = "full"
    """How tokens are selected. `full`: all; `right`: the last; `r_kv`: by importance and redundancy (R-KV, arXiv
    2505.24133 and 2510.02312); `r_kv_centred`: the same, after subtracting each head's mean key; `uniform`: evenly
    spaced; `random`: at random, with `seed`; `keydiff`: the keys that differ most from the mean key."""
    budget: NonNegativeInt = 0
    """Maximum number of tokens kept. Must be 0 for `full`."""
    span: SelectionSpan = "reasoning"
    """Part of the text from which tokens are selected."""
    scope: Scope = "sample"
    """Whether each `head`, each `layer` (all its heads together) or the whole `sample` selects its own tokens."""
    importance_weight: Fraction = 0.5
    """R-KV's lambda: the weight of importance against redundancy. With a real model, answers had a lower cross-entropy
    with 0.5 and 1 than with 0.1. 0.1 is KaVa's value and suits texts with many fillers (docs/results.md)."""
    importance_pool: ImportancePool = "max"
    """How R-KV combines the scores of the query heads that share a KV head."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the selector `random`."""

    @property
    def warning(self) -> str | None:
        """What to know about this selection before it is used on real text; None if nothing."""
        if self.selector != "keydiff":
            return None
        return (
            "selector 'keydiff' keeps few informative tokens of real text: 30 % of the tokens of a real model's "
            "reasoning were digits, but only 2 % of those that it kept (docs/results.md); next: select with 'r_kv' or "
            "'right'"
        )

    @model_validator(mode="after")
    def _budget_fits_selector(self) -> Self:
        if self.selector == "full" and self.budget != 0:
            raise ValueError(f"budget: the selector 'full' keeps all tokens, so it takes no budget; got {self.budget}")
        if self.selector != "full" and self.budget == 0:
            raise ValueError(f"budget: the selector '{self.selector}' needs a budget of at least 1")
        return self


# Options that only these selectors read.
_R_KV = ("r_kv", "r_kv_centred")
_OPTIONS_OF = {"importance_weight": _R_KV, "importance_pool": _R_KV, "seed": ("random",)}


def changed_selection(base: Selection, changes: Mapping[str, object]) -> dict[str, object]:
    """The keys of `base` with `changes`, not validated.

    If `changes` name another selector, the options of `base` that this selector does not read are left out. Selectors
    of plug-ins may read all options.
    """
    kept = base.model_dump(mode="json")
    selector = str(changes.get("selector", base.selector)).replace("-", "_")
    if selector != base.selector and selector in SELECTORS.builtin:
        unread = {option for option, readers in _OPTIONS_OF.items() if selector not in readers}
        unread |= {"budget"} if selector == "full" else set()
        kept = {option: value for option, value in kept.items() if option not in unread}
    return kept | dict(changes)


class CodecSpec(StrictModel):
    """How K/V are encoded for transfer and storage."""

    name: CodecName = "int8"
    """Codec: `raw` (fp32), `bf16`; `int8`, `int6` and `int4` with one scale per group; or `pca`: principal components
    of each layer, rounded and entropy-coded, for which `quality` is set. docs/benchmarks.md has their errors."""
    group_size: Annotated[int, Field(ge=1, le=4096)] = 64
    """Number of elements that share a scale in quantising codecs."""
    max_relative_error: PositiveFloat | None = None
    """Largest relative error accepted for a layer. A sample above it fails. For `pca`, the error is relative to what
    varies in the layer, otherwise to all of it. No limit by default."""


class CodecConfig(CodecSpec):
    """How K/V are encoded, as a run sets it."""

    quality: Annotated[float, Field(ge=0.001, lt=1.0)] | None = None
    """For `pca`: the relative error of what varies in each layer's keys and in its values. The bytes follow from it.
    Defaults to 0.1."""
    bytes_per_token: PositiveFloat | None = None
    """For `pca`, instead of `quality`: the bytes of a token's keys and values in all layers of the plan. The error
    follows from it."""

    @property
    def target_error(self) -> float:
        """The relative error that the codec `pca` aims at."""
        return 0.1 if self.quality is None else self.quality

    @property
    def spec(self) -> CodecSpec:
        """The codec as a plan names it. The map of `pca` has its quality."""
        return CodecSpec(**self.model_dump(exclude={"quality", "bytes_per_token"}))

    @property
    def unmapped(self) -> CodecSpec:
        """How K/V are encoded as long as there is no map: `pca` needs one."""
        return CodecSpec(name="bf16") if self.name == CODED else self.spec

    @model_validator(mode="after")
    def _quality_has_its_codec(self) -> Self:
        for name in ("quality", "bytes_per_token"):
            if getattr(self, name) is not None and self.name != CODED:
                raise ValueError(f"{name}: only the codec '{CODED}' has it; got the codec '{self.name}'")
        if self.quality is not None and self.bytes_per_token is not None:
            raise ValueError("bytes_per_token: conflicts with quality; leave one of them out")
        return self


class PlanMap(StrictModel):
    """A map that `LoadMap` sent to the teacher (`kvcore.tensors.kv_map`), and the shape that it gives K/V."""

    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """Hash of the map's file."""
    heads: PositiveInt
    """Heads of the mapped K/V."""
    head_dim: PositiveInt
    """Head dimension of the mapped K/V."""
    restores: bool = False
    """Whether the client undoes the map after decoding, as the codec `pca` does with whole K/V."""


class KVPlan(StrictModel):
    """What a student requests from a teacher, the same for every sample."""

    layers: tuple[NonNegativeInt, ...]
    """Teacher layers, ascending."""
    selection: Selection = Selection()
    """The tokens to send."""
    codec: CodecSpec = CodecSpec()
    """How K/V are encoded."""
    map: PlanMap | None = None
    """The map that the teacher applies to the selected K/V before it encodes them. By default there is none."""

    @model_validator(mode="after")
    def _mapped_heads_agree(self) -> Self:
        if self.map is not None and self.selection.scope == "head":
            raise ValueError(
                "map: a map mixes heads, which must keep the same tokens: it needs selection.scope 'layer' or "
                "'sample'; got 'head'"
            )
        return self

    @model_validator(mode="after")
    def _codec_has_its_map(self) -> Self:
        if self.codec.name == CODED and self.map is None:
            raise ValueError(f"map: the codec '{CODED}' needs a coded map of the teacher, as kvdistill calibrate makes")
        return self

    @model_validator(mode="after")
    def _layers_ascend(self) -> Self:
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers: expected at least one, ascending and without repeats; got {list(self.layers)}")
        return self

    def digest(self) -> str:
        """Canonical hash. Equal plans have equal digests, independent of key order and omitted defaults."""
        return _digest(self)  # pyright: ignore[reportArgumentType]  frozen models have a hash

    def sent_shape(self, kv_heads: int, head_dim: int) -> tuple[int, int]:
        """Heads and head dimension of what a teacher of this geometry sends."""
        return (kv_heads, head_dim) if self.map is None else (self.map.heads, self.map.head_dim)

    def decoded_shape(self, kv_heads: int, head_dim: int) -> tuple[int, int]:
        """Heads and head dimension of what a client has after decoding."""
        whole = self.map is None or self.map.restores
        return (kv_heads, head_dim) if whole else self.sent_shape(kv_heads, head_dim)

    def with_map(self, named: PlanMap, codec: CodecSpec | None = None) -> KVPlan:
        """The same plan with this map, and with another codec if one is given.

        Raises:
            ValueError: heads keep different tokens.
        """
        return KVPlan(layers=self.layers, selection=self.selection, codec=codec or self.codec, map=named)

    def without_map(self, codec: CodecSpec) -> KVPlan:
        """The plan for the K/V to which a map is fitted, in this codec."""
        return KVPlan(layers=self.layers, selection=self.selection, codec=codec)


class SamplingParams(StrictModel):
    """How a teacher generates text after a prompt."""

    max_new_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    """Maximum number of tokens to generate."""
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """Softmax temperature. 0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Tokens are drawn from the smallest set whose probabilities reach this sum."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the random generator. The sampled text depends only on the seed and the prompt."""
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
    fields = model.model_dump(mode="json")
    if fields.get("map", model) is None:
        del fields["map"]  # A plan without a map has the key that it had before there were maps.
    elif "map" in fields and not fields["map"]["restores"]:
        del fields["map"]["restores"]
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

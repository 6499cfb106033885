"""The settings of one extraction. Free of torch, so that `--help` and validation are instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kvcore.config import StrictModel
from kvcore.plan import COMPRESSIONS, CodecName, CodecSpec, Scope, Selection, SelectionSpan

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0.0)]

DEFAULT_BUDGET = 24


class ExtractConfig(StrictModel):
    """What to extract from which teachers, and where it goes; `extraction/flags.py` says what each field means."""

    teacher_models: Annotated[tuple[str, ...], Field(min_length=1)]
    student_model: Annotated[str, Field(min_length=1)]
    dataset_path: Path
    output_dir: Path
    output_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}$")] = "train_kv"
    format: Literal["pt", "store"] = "pt"
    kv_compression: Literal["right", "r-kv", "full"] = "right"
    kv_budget: Positive | None = None
    span: SelectionSpan | None = None
    scope: Scope = "sample"
    layers: Literal["all", "student"] | None = None
    layer_map_strategy: Literal["ratio", "uniform", "last", "skip", "cka", "learned"] = "ratio"
    codec: CodecName | None = None
    max_length: Positive = 2048
    limit: Positive | None = None
    shard: Annotated[str, Field(pattern=r"^\d{1,6}/\d{1,6}$")] = "1/1"
    on_missing: Literal["fail", "skip"] = "fail"
    teacher_endpoints: tuple[str, ...] = ()
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")] = "auto"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    load_in_8bit: bool = False
    batch_tokens: Positive = 16384
    prefetch: Annotated[int, Field(ge=1, le=64)] = 2
    request_timeout_s: Annotated[float, Field(gt=0.0)] = 600.0
    patience_s: NonNegative = 60.0

    @property
    def selection(self) -> Selection:
        """Which tokens leave the teachers. A store has what training reads by default; a .pt file the whole text's."""
        full = self.kv_compression == "full"
        span: SelectionSpan = "all" if full or self.format == "pt" else "reasoning"
        budget = 0 if full else self.kv_budget or DEFAULT_BUDGET
        selector = COMPRESSIONS[self.kv_compression]
        return Selection(selector=selector, budget=budget, span=self.span or span, scope=self.scope)

    @property
    def codec_spec(self) -> CodecSpec:
        """How K/V travel and are stored; bf16 for a .pt file, which holds no codes."""
        return CodecSpec(name=self.codec or ("bf16" if self.format == "pt" else "int8"))

    @property
    def all_layers(self) -> bool:
        """Whether every teacher layer is kept, rather than those that the student's layers map to."""
        return self.layers == "all" or (self.layers is None and self.format == "pt")

    @property
    def worker(self) -> int:
        """This process's place among the shards, from 0."""
        return int(self.shard.partition("/")[0]) - 1

    @property
    def workers(self) -> int:
        """How many shards there are."""
        return int(self.shard.partition("/")[2])

    @property
    def writer(self) -> str:
        """This process's name among the shards."""
        return f"shard{self.worker + 1}of{self.workers}"

    @property
    def store(self) -> Path:
        """One store for each teacher is in here: the result, or what the .pt file is written from."""
        name = self.output_name if self.format == "store" else f"{self.output_name}.parts"
        return self.output_dir / name

    @property
    def pt_path(self) -> Path:
        """The .pt file."""
        return self.output_dir / f"{self.output_name}.pt"

    @property
    def report_path(self) -> Path:
        """What was written, and what was left out."""
        return self.output_dir / f"{self.output_name}.report.json"

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if not 0 <= self.worker < self.workers:
            raise ValueError(f"shard: I/N counts from 1/N to N/N; got '{self.shard}'")
        if self.kv_compression == "full" and self.kv_budget is not None:
            raise ValueError(f"kv_budget: 'full' keeps all tokens, so it takes no budget; got {self.kv_budget}")
        if self.scope != "sample" and self.kv_compression != "r-kv":
            raise ValueError(f"scope: '{self.kv_compression}' chooses the same tokens everywhere; use 'sample'")
        if self.load_in_8bit and self.teacher_endpoints:
            raise ValueError("load_in_8bit: is for servers that are started here; start yours with --load-in-8bit")
        return self

"""The configuration of `kvdistill extract`. Imports no torch, so that `--help` and validation are fast."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from kvcore.config import Device, FileName, NonNegativeFloat, PositiveFloat, PositiveInt, StrictModel, Text
from kvcore.flags import FlagSet
from kvcore.plan import CODED, CodecName, CodecSpec, Scope, Selection, SelectionSpan

DEFAULT_BUDGET = 24


def _shard(text: str) -> str:
    if not re.fullmatch(r"[0-9]{1,6}/[0-9]{1,6}", text):
        raise ValueError("expected I/N, such as 2/8")
    return text


class ExtractConfig(StrictModel):
    """One extraction: a dataset, the teachers, and the file or store that is written."""

    headings: ClassVar = {
        "Models and data": "teacher_models",
        "Output": "output_dir",
        "Selection and encoding": "kv_compression",
        "Teachers": "teacher_endpoints",
        "Workers": "shard",
    }

    teacher_models: Annotated[tuple[str, ...], Field(min_length=1)]
    """Directories or hub ids of the teachers. Unless `teacher_endpoints` is set, the command starts a server for each
    on this machine."""
    student_model: Text
    """Directory or hub id of the student. `max_length` counts tokens of its tokenizer, and `layers: student` uses its
    layers."""
    dataset_path: Path
    """Directory written by Dataset.save_to_disk, or a JSON Lines file, with id, prompt, reasoning and answer."""
    max_length: PositiveInt = 2048
    """Maximum length of a sample in the student's tokens. Longer samples are skipped and listed in the report."""
    limit: PositiveInt | None = None
    """Number of records to read from the dataset. All by default."""

    output_dir: Path
    """Directory for the result."""
    output_name: FileName = "train_kv"
    """Name of the result in that directory."""
    format: Literal["pt", "store"] = "pt"
    """Format of the result. `pt`: the file NAME.pt, a list for torch.load; `store`: one store per teacher,
    NAME/TEACHER, for training with `kv.mode: offline`."""

    kv_compression: Literal["right", "r_kv", "full"] = "right"
    """Tokens that are kept. `right`: the last tokens of the span; `r_kv`: the tokens with the highest R-KV score
    (importance and diversity); `full`: all tokens."""
    kv_budget: PositiveInt | None = None
    """Number of tokens that `right` and `r_kv` keep. Defaults to 24."""
    span: SelectionSpan | None = None
    """Part of the text from which tokens are selected. Defaults to `reasoning` for a store with `right` or `r_kv`, and
    to `all` otherwise. Samples of style direct have no reasoning."""
    scope: Scope = "sample"
    """For `r_kv`: whether each `head`, each `layer` or the whole `sample` selects its own tokens."""
    layers: Literal["all", "student"] | None = None
    """Teacher layers that are kept. `all`: all layers; `student`: those that the student's layers map to. Defaults to
    `all` for pt and `student` for a store."""
    layer_map_strategy: Literal["ratio", "uniform", "last", "skip", "cka", "learned"] = "uniform"
    """Map from student layers to teacher layers, which determines the layers that `layers: student` keeps."""
    codec: CodecName | None = None
    """How K/V are encoded: raw (fp32), bf16, int8, int6 or int4; pca is refused, because it needs a KV map. Defaults to
    bf16 for pt and int8 for a store. A .pt file holds fp32 for raw, and bf16 otherwise."""

    teacher_endpoints: tuple[str, ...] = ()
    """Running servers as NAME=HOST:PORT[,HOST:PORT], where NAME is the last part of the model; or @FILE with one per
    line."""
    device: Device = "auto"
    """Device of servers that this command starts: auto, cpu, cuda or cuda:N. Several GPUs are assigned in turn."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Data type of the weights of servers that this command starts. `auto` is bf16 on a GPU and fp32 on a CPU."""
    load_in_8bit: bool = False
    """Quantise the weights of servers that this command starts to 8 bits (bitsandbytes, needs a GPU)."""
    batch_tokens: PositiveInt = 16384
    """Maximum number of padded tokens in a request, and in a batch of servers that this command starts."""
    request_timeout_s: PositiveFloat = 600.0
    """Deadline of a request in seconds."""
    patience_s: NonNegativeFloat = 60.0
    """Seconds a teacher may be unreachable before it counts as lost."""
    on_missing: Literal["fail", "skip"] = "fail"
    """What to do with samples that a teacher cannot serve. `fail`: store all others, then fail with the reasons;
    `skip`: leave them out and list them in the report."""

    shard: Annotated[str, AfterValidator(_shard)] = "1/1"
    """I/N: this process is worker I of N, counted from 1. All workers need the same other flags."""

    @model_validator(mode="after")
    def _codec_needs_no_map(self) -> Self:
        if self.codec == CODED:
            raise ValueError(
                f"codec: '{CODED}' needs a KV map, which an extraction does not have; use another codec, or record a "
                "store in training (kv.mode record)"
            )
        return self

    @property
    def selection(self) -> Selection:
        """The tokens that are kept. By default a store holds what training reads, and a .pt file the whole text."""
        full = self.kv_compression == "full"
        span: SelectionSpan = "all" if full or self.format == "pt" else "reasoning"
        budget = 0 if full else self.kv_budget or DEFAULT_BUDGET
        return Selection(selector=self.kv_compression, budget=budget, span=self.span or span, scope=self.scope)

    @property
    def codec_spec(self) -> CodecSpec:
        """How K/V are encoded for transfer and storage."""
        return CodecSpec(name=self.codec or ("bf16" if self.format == "pt" else "int8"))

    @property
    def all_layers(self) -> bool:
        """Whether all teacher layers are kept, not only those that the student's layers map to."""
        return self.layers == "all" or (self.layers is None and self.format == "pt")

    @property
    def worker(self) -> int:
        """Index of this process among the workers, from 0."""
        return int(self.shard.partition("/")[0]) - 1

    @property
    def workers(self) -> int:
        """Number of workers."""
        return int(self.shard.partition("/")[2])

    @property
    def writer(self) -> str:
        """Name of this worker's part of the store."""
        return f"shard{self.worker + 1}of{self.workers}"

    @property
    def store(self) -> Path:
        """Directory with one store per teacher: the result, or the source of the .pt file."""
        name = self.output_name if self.format == "store" else f"{self.output_name}.parts"
        return self.output_dir / name

    @property
    def pt_path(self) -> Path:
        """The .pt file."""
        return self.output_dir / f"{self.output_name}.pt"

    @property
    def report_path(self) -> Path:
        """Report of what was written and what was skipped."""
        return self.output_dir / f"{self.output_name}.report.json"

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if not 0 <= self.worker < self.workers:
            raise ValueError(f"shard: expected I/N with I from 1 to N; got '{self.shard}'")
        if self.kv_compression == "full" and self.kv_budget is not None:
            raise ValueError(f"kv_budget: 'full' keeps all tokens, so it takes no budget; got {self.kv_budget}")
        if self.scope != "sample" and self.kv_compression != "r_kv":
            raise ValueError(f"scope: '{self.kv_compression}' selects the same tokens everywhere; use 'sample'")
        if self.load_in_8bit and self.teacher_endpoints:
            raise ValueError(
                "load_in_8bit: running servers have loaded their weights; use kvdistill serve --load-in-8bit"
            )
        return self


FLAGS = FlagSet(
    ExtractConfig,
    """Write the K/V of teachers for a dataset, in both styles (cot, direct), to a file or a store.

Keys are content keys (without rotary positions) in the teacher's own geometry. After an interruption, the same command
continues where it stopped.""",
    """# Two teachers, served on this machine while the command runs, into one .pt file
COMMAND --teacher-models Qwen/Qwen2.5-7B Qwen/Qwen2.5-14B --student-model Qwen/Qwen2.5-1.5B \\
    --dataset-path data/prepared/train --output-dir kv_cache/qwen --device cuda
# A store for `kvdistill train` with kv.mode=offline, from servers that already run
COMMAND --teacher-models Qwen/Qwen2.5-7B --student-model Qwen/Qwen2.5-1.5B \\
    --teacher-endpoints Qwen2.5-7B=node1:50051,node2:50051 --format store --kv-compression r_kv \\
    --dataset-path data/prepared/train --output-dir kv_cache/qwen
# Worker 2 of 4, for example in a SLURM array; the last worker to finish writes the .pt file
COMMAND --teacher-models Qwen/Qwen2.5-7B --student-model Qwen/Qwen2.5-1.5B \\
    --dataset-path data/prepared/train --output-dir kv_cache/qwen --shard 2/4""",
    script="scripts/extract_dual_style_kv.py",
)

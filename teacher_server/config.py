"""The configuration of `kvdistill serve`. Free of torch, so that `--help` and validation are instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kvcore.config import StrictModel
from kvcore.plugins import NameTable

MIB = 1 << 20

Positive = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(ge=0.0)]

ENGINES = NameTable(
    "engine",
    "kvdistill.engines",
    {
        "hf": "teacher_server.engines.hf.hf_engine:load",
        "vllm": "teacher_server.engines.vllm.vllm_engine:load",
        "fake": "teacher_server.engines.fake:load",
    },
)

VLLM_FIELDS = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "max_model_len",
    "gpu_memory_utilization",
    "worker_address",
    "vllm_args",
)


class ServeConfig(StrictModel):
    """One teacher replica: what it serves, where it listens, and how much it takes on.

    `model`: a directory or hub id that transformers loads; for the engine `fake` a specification such as
    `fake:layers=3,heads=2,dim=16,delay_ms=0`. `name`: how the teacher calls itself, the model by default.
    `dtype: auto` is bf16 on a GPU and fp32 on a CPU; quantised weights (`load_in_8bit`, `load_in_4bit`) are computed in
    it. A port of 0 picks a free one.
    `tls_cert` and `tls_key`: PEM files with which the gRPC service speaks TLS. `token_file`: holds what callers must
    show then. The HTTP pages have neither.
    `max_sample_tokens`: the longest sample, the model's own context by default. `max_batch_tokens`: padded tokens that
    go through the model at once. `max_queued_tokens`: what may wait or run before requests are refused.
    `max_streams`: requests open at once. `max_frame_bytes`: the largest body of one frame. `stream_window_bytes`: what
    one stream may hold for a slow reader. `max_request_seconds`: the deadline of a call, and the most a caller's own
    deadline counts.
    `drain_seconds`: how long running requests may take after SIGTERM. `threads`: torch's CPU threads.
    Of the engine `vllm` alone: `tensor_parallel_size` and `pipeline_parallel_size`: how many GPUs the model is spread
    over, their product; `max_model_len`: the longest sample, written text included, that the cache is laid out for;
    `gpu_memory_utilization`: the share of each GPU's memory that weights and cache may take;
    `worker_address`: where this server takes keys and values from workers on other nodes; `vllm_args`: further
    arguments of vLLM's engine as a JSON object.
    """

    model: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    revision: str | None = None
    engine: Annotated[str, ENGINES] = "hf"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")] = "auto"
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    trust_remote_code: bool = False
    grpc_host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    grpc_port: Port = 0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None
    http_host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    http_port: Port = 0
    max_sample_tokens: Positive | None = None
    max_samples_per_request: Positive = 256
    max_batch_tokens: Positive = 16384
    max_queued_tokens: Positive = 1_048_576
    max_streams: Positive = 128
    max_frame_bytes: Annotated[int, Field(ge=4096, le=64 * MIB)] = MIB
    stream_window_bytes: Annotated[int, Field(ge=65536)] = 64 * MIB
    max_request_seconds: Annotated[float, Field(gt=0.0)] = 600.0
    drain_seconds: Seconds = 30.0
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    threads: Positive | None = None
    tensor_parallel_size: Positive = 1
    pipeline_parallel_size: Positive = 1
    max_model_len: Positive | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    worker_address: Annotated[str, Field(pattern=r"^\S+:\d{1,5}$")] | None = None
    vllm_args: str = "{}"

    @property
    def teacher_name(self) -> str:
        """The name that clients and logs see."""
        return self.name or self.model

    @model_validator(mode="after")
    def _limits_agree(self) -> Self:
        if self.stream_window_bytes < self.max_frame_bytes:
            raise ValueError(
                f"stream_window_bytes: {self.stream_window_bytes} is less than one frame, which takes up to "
                f"{self.max_frame_bytes} bytes (max_frame_bytes)"
            )
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_4bit: weights are read in 8 or in 4 bits, not both")
        if self.engine == "fake" and not self.model.startswith("fake:"):
            raise ValueError(f"model: the engine 'fake' takes one such as fake:layers=3,heads=2; got '{self.model}'")
        return self

    @model_validator(mode="after")
    def _secrets_go_over_tls(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_key: a certificate and its key go together (tls_cert, tls_key)")
        if self.token_file is not None and self.tls_cert is None:
            raise ValueError("token_file: a token goes over TLS alone; set tls_cert and tls_key")
        return self

    @model_validator(mode="after")
    def _engine_has_its_options(self) -> Self:
        if self.engine == "vllm":
            refused = {"load_in_8bit", "load_in_4bit", "threads"}
            hint = "the engine 'vllm' does not take it"
        else:
            refused = set(VLLM_FIELDS)
            hint = f"is for the engine 'vllm'; the engine is '{self.engine}'"
        wrong = sorted(name for name in refused if getattr(self, name) != type(self).model_fields[name].default)
        if wrong:
            raise ValueError(f"{wrong[0]}: {hint}")
        if self.worker_address is not None and not 1 <= int(self.worker_address.rpartition(":")[2]) <= 65535:
            raise ValueError(f"worker_address: got '{self.worker_address}'; a port is 1 to 65535")
        return self

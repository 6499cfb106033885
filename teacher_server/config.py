"""The configuration of `kvdistill serve`. Imports no torch, so that `--help` and validation are fast."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from kvcore import early_checks
from kvcore.config import (
    Device,
    Endpoint,
    NonNegativeFloat,
    NonNegativeInt,
    Port,
    PositiveFloat,
    PositiveInt,
    StrictModel,
    Text,
)
from kvcore.flags import FlagSet
from kvcore.plugins import NameTable
from teacher_server.chaos_spec import check_chaos

MIB = 1 << 20

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
    """One replica of a teacher: the model, its addresses and its limits."""

    headings: ClassVar = {
        "Model": "model",
        "Addresses and access": "grpc_host",
        "Limits": "max_sample_tokens",
        "vLLM": "tensor_parallel_size",
        "Logging": "log_level",
    }

    model: Text
    """Directory or hub id of a transformers model. For the engine `fake`, a specification such as `fake:layers=3`."""
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """The teacher's name in logs and answers. Defaults to the model."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    engine: Annotated[str, ENGINES] = "hf"
    """Engine that runs the model: transformers, vLLM, or a fake model for tests."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Data type of the weights, and of the computation with quantised weights. `auto` is bf16 on a GPU and fp32 on a
    CPU."""
    device: Device = "auto"
    """Device of the model: auto, cpu, cuda or cuda:N."""
    load_in_8bit: bool = False
    """Quantise the weights to 8 bits with bitsandbytes (extra `gpu`, needs a GPU)."""
    load_in_4bit: bool = False
    """Quantise the weights to 4 bits with bitsandbytes (extra `gpu`, needs a GPU)."""
    trust_remote_code: bool = False
    """Run Python code that is part of the model's repository."""
    threads: PositiveInt | None = None
    """Number of CPU threads of torch. Torch decides by default."""

    grpc_host: Text = "127.0.0.1"
    """Address on which the gRPC service listens."""
    grpc_port: Port = 0
    """Port of the gRPC service. 0 picks a free port, which the log names."""
    tls_cert: Path | None = None
    """PEM file with the certificate of the gRPC service. Enables TLS for it, not for the HTTP pages."""
    tls_key: Path | None = None
    """PEM file with the private key of `tls_cert`."""
    tls_client_ca: Path | None = None
    """PEM file with certificates of authorities. The gRPC service then accepts only clients with a certificate that one
    of them signed. Needs TLS."""
    token_file: Path | None = None
    """File with the token that gRPC callers must send. Needs TLS."""
    insecure: bool = False
    """Allow a `grpc_host` other than loopback without a token or client certificates. Anyone who reaches the port can
    then use the teacher."""
    http_host: Text = "127.0.0.1"
    """Address on which the status page, /healthz, /readyz, /metrics and /info are served."""
    http_port: Port = 0
    """Port of the HTTP pages. 0 picks a free port, which the log names."""

    max_sample_tokens: PositiveInt | None = None
    """Maximum number of tokens in a sample. Defaults to the model's context length."""
    max_samples_per_request: PositiveInt = 256
    """Maximum number of samples in a request."""
    max_batch_tokens: PositiveInt = 16384
    """Maximum number of padded tokens in a batch of the model."""
    max_queued_tokens: PositiveInt = 1_048_576
    """Maximum number of tokens that wait or run. The server refuses further requests. It estimates the tokens of a
    request from its bytes."""
    max_streams: PositiveInt = 128
    """Maximum number of open requests."""
    max_frame_bytes: Annotated[int, Field(ge=4096, le=64 * MIB)] = MIB
    """Maximum size of a frame's body in bytes."""
    max_map_bytes: Annotated[int, Field(ge=1)] = 512 * MIB
    """Host memory in bytes for the maps that callers load (`align.basis_rank`, `align.map_at` and the codec `pca` of
    runs). It also limits the size of one map."""
    cache_bytes: NonNegativeInt = 0
    """Host memory in bytes for the encoded K/V of recent samples. A sample of at least 32 tokens that is requested
    again with the same plan is then sent without the model, as in later epochs and by other runs of a sweep. It pays if
    all samples of an epoch fit (`kvdistill plan` shows their bytes), or those that several runs read at about the same
    time. 0 keeps nothing."""
    stream_window_bytes: Annotated[int, Field(ge=65536)] = 64 * MIB
    """Maximum number of bytes that a stream buffers for a slow reader."""
    max_unsent_bytes: Annotated[int, Field(ge=65536)] = 1024 * MIB
    """Maximum number of bytes that all streams together buffer for slow readers. A stream buffers at most an eighth of
    the bytes that are free."""
    shared_memory_bytes: NonNegativeInt = 512 * MIB
    """Memory in bytes for large frames to clients on the same machine that run as the same user. Such clients then take
    less CPU time than through the network. Clients that find none left use the network. 0 shares none."""
    shared_client_bytes: Annotated[int, Field(ge=1)] = 64 * MIB
    """Maximum number of these bytes for one client. It gets room for as many frames of `max_frame_bytes` bytes as fit,
    at most 32."""
    max_request_seconds: PositiveFloat = 600.0
    """Maximum duration of a request in seconds. It replaces a longer deadline of a caller."""
    drain_seconds: NonNegativeFloat = 30.0
    """Seconds that running requests may take after SIGTERM."""

    tensor_parallel_size: PositiveInt = 1
    """Number of GPUs that share each layer (engine `vllm`)."""
    pipeline_parallel_size: PositiveInt = 1
    """Number of groups of GPUs that share the layers (engine `vllm`)."""
    max_model_len: PositiveInt | None = None
    """Maximum number of tokens in a sample, including generated text; determines the size of vLLM's cache (engine
    `vllm`). Defaults to the model's context length."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Fraction of each GPU's memory for weights and cache (engine `vllm`)."""
    worker_address: Endpoint | None = None
    """HOST:PORT on which this server receives K/V from workers on other nodes (engine `vllm`). By default it uses a
    local socket."""
    vllm_args: str = "{}"
    """More arguments of vLLM's engine as a JSON object, such as '{"max_num_batched_tokens": 16384}'."""

    chaos: Annotated[str, AfterValidator(check_chaos)] | None = None
    """Make faults on purpose, to rehearse what a run does: `delay=200ms,abort=0.05,truncate=0.02,flip=0.01,seed=1`
    delays every answer, and these parts of the answers end with an error, end early, or have a changed bit. Only on
    loopback."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level of log messages."""

    @property
    def teacher_name(self) -> str:
        """The name in logs and answers."""
        return self.name or self.model

    @model_validator(mode="after")
    def _limits_agree(self) -> Self:
        if self.stream_window_bytes < self.max_frame_bytes:
            raise ValueError(
                f"stream_window_bytes: {self.stream_window_bytes} is smaller than a frame of up to "
                f"{self.max_frame_bytes} bytes (max_frame_bytes)"
            )
        if self.max_unsent_bytes < self.stream_window_bytes:
            raise ValueError(
                f"max_unsent_bytes: {self.max_unsent_bytes} is smaller than the window of one stream, "
                f"{self.stream_window_bytes} bytes (stream_window_bytes)"
            )
        if self.shared_memory_bytes:
            self._check_shared_memory()
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_4bit: conflicts with load_in_8bit; set one of them")
        if self.engine == "fake" and not self.model.startswith("fake:"):
            raise ValueError(
                f"model: the engine 'fake' expects a model such as fake:layers=3,heads=2; got '{self.model}'"
            )
        return self

    def _check_shared_memory(self) -> None:
        if self.shared_client_bytes < self.max_frame_bytes:
            raise ValueError(
                f"shared_client_bytes: {self.shared_client_bytes} is smaller than a frame of up to "
                f"{self.max_frame_bytes} bytes (max_frame_bytes)"
            )
        if self.shared_memory_bytes < self.shared_client_bytes:
            raise ValueError(
                f"shared_memory_bytes: {self.shared_memory_bytes} is smaller than the memory of one client, "
                f"{self.shared_client_bytes} bytes (shared_client_bytes); 0 shares no memory"
            )

    @model_validator(mode="after")
    def _access_is_safe(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_key: set both tls_cert and tls_key, or neither")
        if self.token_file is not None and self.tls_cert is None:
            raise ValueError("token_file: a token needs TLS; set tls_cert and tls_key")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca: client certificates need TLS; set tls_cert and tls_key")
        identifies_callers = self.token_file is not None or self.tls_client_ca is not None
        if not self.insecure and not _is_loopback(self.grpc_host) and not identifies_callers:
            raise ValueError(
                f"grpc_host: '{self.grpc_host}' lets other machines use the teacher; set tls_cert, tls_key and "
                "token_file or tls_client_ca, or insecure on a network where everyone may use it"
            )
        if self.chaos is not None and not _is_loopback(self.grpc_host):
            raise ValueError(
                f"chaos: '{self.chaos}' makes faults on purpose, which is only for a grpc_host on loopback; "
                f"got '{self.grpc_host}'"
            )
        return self

    @model_validator(mode="after")
    def _engine_has_its_options(self) -> Self:
        if self.engine == "vllm":
            refused = {"load_in_8bit", "load_in_4bit", "threads"}
            hint = "is not supported by the engine 'vllm'"
        else:
            refused = set(VLLM_FIELDS)
            hint = f"needs the engine 'vllm'; the engine is '{self.engine}'"
        wrong = sorted(name for name in refused if getattr(self, name) != type(self).model_fields[name].default)
        if wrong:
            raise ValueError(f"{wrong[0]}: {hint}")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_host(config: ServeConfig) -> None:
    """Checks, without torch, that this machine can have the device and the model.

    Raises:
        FieldError: names the field and its value.
    """
    if config.engine not in ("hf", "vllm"):
        return
    early_checks.check_device(config.device, "device")
    for field in ("load_in_8bit", "load_in_4bit"):
        if getattr(config, field):
            early_checks.check_quantised(config.device, field)
    early_checks.check_model(config.model, "model", teacher=True)


FLAGS = FlagSet(
    ServeConfig,
    "Serve one teacher's K/V over gRPC until SIGTERM, then let running requests end.",
    """# A teacher on this machine
COMMAND --model meta-llama/Llama-3.1-8B-Instruct --grpc-port 50051 --http-port 8001
# On the second GPU, for trainers on other machines
COMMAND --model /models/qwen --dtype bf16 --device cuda:1 --grpc-host 0.0.0.0 --grpc-port 50052 \\
    --tls-cert server.crt --tls-key server.key --token-file token
# A large teacher on eight GPUs with vLLM
COMMAND --engine vllm --model meta-llama/Llama-3.1-70B --tensor-parallel-size 8 --dtype bf16 \\
    --grpc-port 50051
# Random K/V without a model, to test a client
COMMAND --engine fake --model fake:layers=3,heads=2,dim=16""",
)

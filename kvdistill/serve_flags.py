"""The flags of `kvdistill serve`: one for each field of ServeConfig, with its type and default. Free of torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_type_hints

import typer

from kvcore.config import parse
from kvcore.errors import ConfigError, FieldError
from kvcore.plugins import NameTable
from teacher_server.config import ServeConfig

# Headings of --help, in order; under each its fields and what to say about them.
PANELS: Mapping[str, Mapping[str, str]] = {
    "Model": {
        "model": "A directory or hub id that transformers loads; for the fake engine its shape, such as fake:layers=3.",
        "name": "How the teacher calls itself; its model by default.",
        "revision": "Branch, tag or commit of a hub model.",
        "engine": "What runs the model.",
        "dtype": "Of the weights; auto is bf16 on a GPU and fp32 on a CPU.",
        "device": "auto, cpu, cuda or cuda:N.",
        "load_in_8bit": "Quantise the weights with bitsandbytes (extra: gpu).",
        "load_in_4bit": "The same, in 4 bits.",
        "trust_remote_code": "Run the Python code that comes with the model.",
        "threads": "CPU threads of torch; its own choice by default.",
    },
    "Where it listens": {
        "grpc_host": "Address of the gRPC service.",
        "grpc_port": "Port of the gRPC service; 0 picks a free one and logs it.",
        "tls_cert": "PEM file: the gRPC service speaks TLS, and is known by this certificate.",
        "tls_key": "PEM file: the certificate's key.",
        "token_file": "File with the token that callers must show, over TLS.",
        "http_host": "Address of /healthz, /readyz, /metrics and /info.",
        "http_port": "Port of the HTTP pages; 0 picks a free one and logs it.",
    },
    "Limits": {
        "max_sample_tokens": "Longest sample; the model's context by default.",
        "max_samples_per_request": "Most samples of one request.",
        "max_batch_tokens": "Padded tokens that go through the model at once.",
        "max_queued_tokens": "Tokens that may wait or run before requests are refused.",
        "max_streams": "Requests open at once.",
        "max_frame_bytes": "Largest body of one frame.",
        "stream_window_bytes": "What one stream may hold for a slow reader.",
        "max_request_seconds": "Longest a call may take.",
        "drain_seconds": "How long running requests may take after SIGTERM.",
    },
    "vLLM": {
        "tensor_parallel_size": "GPUs that each layer is spread over.",
        "pipeline_parallel_size": "Groups of GPUs that the layers are spread over.",
        "max_model_len": "Longest sample that the cache is laid out for; the model's context by default.",
        "gpu_memory_utilization": "Share of each GPU's memory for weights and cache.",
        "worker_address": "host:port where workers on other nodes reach this server; a local socket by default.",
        "vllm_args": """Further arguments of vLLM's engine, JSON: '{"max_num_batched_tokens": 16384}'.""",
    },
    "Log": {"log_level": "Least severe messages that are logged."},
}


def with_serve_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the signature from which typer makes the flags."""
    types = get_type_hints(ServeConfig)
    parameters = [
        _flag(name, types[name], text, panel) for panel, fields in PANELS.items() for name, text in fields.items()
    ]
    command.__signature__ = inspect.Signature(parameters)
    return command


def _flag(name: str, kind: Any, text: str, panel: str) -> inspect.Parameter:
    field = ServeConfig.model_fields[name]
    option = typer.Option(f"--{name.replace('_', '-')}", help=text, rich_help_panel=panel)
    for table in field.metadata:
        if isinstance(table, NameTable):
            option.metavar, option.autocompletion = "|".join(table), _beginning(table)
    default = inspect.Parameter.empty if field.is_required() else field.default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _beginning(table: NameTable) -> Callable[[str], list[str]]:
    """What completes the beginning of a name."""
    return lambda incomplete: [name for name in table if name.startswith(incomplete)]


def serve_config(flags: Mapping[str, Any]) -> ServeConfig:
    """Validates the flags together.

    Raises:
        FieldError: naming the first wrong flag as the user typed it.
        ConfigError: two flags do not go together.
    """
    try:
        return parse(flags, ServeConfig)
    except FieldError as error:
        if error.field not in ServeConfig.model_fields:
            raise ConfigError(error.problem) from error
        raise FieldError(f"--{error.field.replace('_', '-')}", error.problem) from error

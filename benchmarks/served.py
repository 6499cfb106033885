"""A teacher server process for benchmarks, and the random models that it serves by default."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from transformers import Qwen2Config, Qwen2ForCausalLM

from data.synthetic import ChainTask, make_splits
from experiments.demo.tokenizers import build_tokenizer
from kvcore.plan import KVPlan
from kvcore.types import Sample, TeacherInfo
from kvcore.wire import messages
from kvdistill.describe import describe
from protos import kv_cache_pb2 as pb
from student_trainer.launching.local_teachers import LocalTeachers

TIMEOUT_S = 60.0
MAX_MESSAGE_BYTES = 64 << 20
# The server's CPU time is compared with that of a model on one thread.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, slots=True)
class ServedTeacher:
    """A local server and a connection to it."""

    process: psutil.Process
    info: TeacherInfo
    channel: grpc.Channel

    def cpu_seconds(self) -> float:
        """User and system time of the server so far."""
        times = self.process.cpu_times()
        return times.user + times.system

    def memory_mb(self) -> float:
        """The server's resident memory in MiB."""
        return self.process.memory_info().rss / 2**20

    def frames(self, plan: KVPlan, samples: Sequence[Sample], request_id: str) -> Iterator[bytes]:
        """The serialised frames of one request."""
        ask: Any = self.channel.unary_stream(
            "/kvcache.v1.TeacherKV/StreamKV", request_serializer=pb.KVRequest.SerializeToString
        )
        sent = [messages.sample_to_proto(sample) for sample in samples]
        request = pb.KVRequest(request_id=request_id, plan=messages.plan_to_proto(plan), samples=sent)
        return ask(request, timeout=TIMEOUT_S)


@contextlib.contextmanager
def served_teacher(model: str, log_dir: Path, device: str, dtype: str, **options: object) -> Iterator[ServedTeacher]:
    """Context manager that runs a server. `options`: further flags of `kvdistill serve`."""
    running = set(psutil.Process().children())
    servers = LocalTeachers(
        {"teacher": model}, log_dir, device=device, dtype=dtype, options=options, environment=ENVIRONMENT
    )
    with servers as endpoints:
        (process,) = set(psutil.Process().children()) - running
        limits = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        with grpc.insecure_channel(endpoints["teacher"], options=limits) as channel:
            yield ServedTeacher(process, describe(endpoints["teacher"]), channel)


def save_random_qwen2(directory: Path, **geometry: Any) -> str:
    """Writes a Qwen2 with random weights and the demo's tokenizer; returns the directory.

    `geometry`: fields of transformers' Qwen2Config.
    """
    tokenizer = build_tokenizer("teacher_a", make_splits(ChainTask(), 2048, 1, 1, seed=0).train)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **geometry)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)

"""Measures the cost of serving K/V: one server process and one client, with int8 and raw in turns.

Prints one JSON object as its last line. Every round sends the same requests with each codec; medians of the rounds are
reported. For the built-in tiny model, `overhead_cpu_ms` is the server's CPU time per request minus the model's forward
pass, which is measured in this process after the server has ended. `batches` compares batches of samples of similar
length with batches in order of arrival, on lengths as in GSM8K: those of --texts, or of gsm8k.jsonl in the folder
KVDISTILL_DATA_DIR, or drawn from a similar distribution. Without --model, `overlap` compares the service with
the bare model, and one request at a time with two, on a CPU (`serve_overlap`).

Examples:
  python -m benchmarks.serve
  KVDISTILL_DATA_DIR=/data python -m benchmarks.serve --rounds 3
  python -m benchmarks.serve --model Qwen/Qwen2.5-7B --dtype bf16 --device cuda:0 --budget 24 --requests 50
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import serve_batches, serve_overlap
from benchmarks.served import ServedTeacher, save_random_qwen2, served_teacher
from data.synthetic import ChainTask
from kvcore.plan import CodecName, CodecSpec, KVPlan, Selection
from kvcore.types import EncodedSampleKV, Sample
from kvcore.wire.stream_reader import StreamReader
from teacher_server.config import ServeConfig
from teacher_server.engines.hf import hf_engine as hf

CODECS: tuple[CodecName, ...] = ("int8", "raw")
# In each arm of a round of `serve_overlap`.
OVERLAP_REQUESTS = 4
TINY = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One round of one codec, or the medians of several. Milliseconds and CPU time are per request."""

    tokens_per_s: float
    samples_per_s: float
    bytes_per_s: float
    bytes_per_sample: float
    request_ms: float
    first_frame_ms: float
    model_ms: float
    encode_ms: float
    server_cpu_ms: float
    client_cpu_ms: float


@dataclass(slots=True)
class Answer:
    """The response to one request."""

    seconds: float
    first_frame_s: float
    nbytes: int
    frames: int
    samples: list[EncodedSampleKV]


def ask(teacher: ServedTeacher, plan: KVPlan, samples: Sequence[Sample]) -> Answer:
    """Sends one request and reads the response as a student does."""
    request_id = uuid.uuid4().hex
    reader = StreamReader(request_id, plan, samples, teacher.info)
    answer = Answer(0.0, 0.0, 0, 0, [])
    started = time.perf_counter()
    for frame in teacher.frames(plan, samples, request_id):
        if not answer.frames:
            answer.first_frame_s = time.perf_counter() - started
        answer.frames += 1
        answer.nbytes += len(frame)
        for _, outcome in reader.feed(frame):
            if not isinstance(outcome, EncodedSampleKV):
                raise SystemExit(f"a sample failed: {outcome}")
            answer.samples.append(outcome)
    reader.finish()
    answer.seconds = time.perf_counter() - started
    return answer


def measure(teacher: ServedTeacher, plan: KVPlan, requests: list[list[Sample]]) -> Measured:
    """Measures one round of sequential requests."""
    own = psutil.Process()
    server_before, client_before = teacher.cpu_seconds(), sum(own.cpu_times()[:2])
    answers = [ask(teacher, plan, samples) for samples in requests]
    server_s = (teacher.cpu_seconds() - server_before) / len(answers)
    client_s = (sum(own.cpu_times()[:2]) - client_before) / len(answers)
    seconds = sum(answer.seconds for answer in answers)
    samples = [sample for answer in answers for sample in answer.samples]
    # All samples of a batch report the time of the batch, and a small request is one batch.
    model_s = statistics.mean(answer.samples[0].timings.prefill for answer in answers)
    encode_s = statistics.mean(answer.samples[0].timings.encode for answer in answers)
    return Measured(
        tokens_per_s=sum(len(sample.token_ids_T) for sample in samples) / seconds,
        samples_per_s=len(samples) / seconds,
        bytes_per_s=sum(answer.nbytes for answer in answers) / seconds,
        bytes_per_sample=sum(answer.nbytes for answer in answers) / len(samples),
        request_ms=1e3 * seconds / len(answers),
        first_frame_ms=1e3 * statistics.mean(answer.first_frame_s for answer in answers),
        model_ms=1e3 * model_s,
        encode_ms=1e3 * encode_s,
        server_cpu_ms=1e3 * server_s,
        client_cpu_ms=1e3 * client_s,
    )


def medians(rounds: Sequence[Measured]) -> dict[str, float]:
    """The median of each field over the rounds."""
    return {
        entry.name: round(statistics.median(getattr(measured, entry.name) for measured in rounds), 3)
        for entry in fields(Measured)
    }


def chain_requests(count: int, samples: int, operations: int) -> list[list[Sample]]:
    """Requests of chain arithmetic without duplicate samples."""
    task = ChainTask(operations=operations)
    records = [task.record(question * 7919 % task.questions) for question in range(count * samples)]
    return [
        [record.sample() for record in records[start : start + samples]] for start in range(0, len(records), samples)
    ]


def model_cpu_ms(model: str, requests: list[list[Sample]]) -> float:
    """CPU time of one request's forward pass, with the importance that R-KV needs."""
    torch.set_num_threads(1)
    engine = hf.load(ServeConfig(model=model, device="cpu", dtype="fp32"))
    read = [[engine.tokenize(sample) for sample in samples] for samples in requests]
    layers = range(engine.info.layers)
    spent: list[float] = []
    for batch in read:
        before = time.process_time()
        engine.prefill(batch, layers, True, lambda _output: None)
        spent.append(time.process_time() - before)
    return 1e3 * statistics.median(spent)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Starts the server and runs the benchmark."""
    requests = chain_requests(arguments.requests, arguments.samples, arguments.operations)
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model or save_random_qwen2(Path(scratch) / "model", **TINY)
        with served_teacher(model, Path(scratch) / "logs", arguments.device, arguments.dtype) as teacher:
            rounds = _rounds(arguments, teacher, requests)
            layers, memory_mb = teacher.info.layers, teacher.memory_mb()
        results = {codec: medians(measured) for codec, measured in rounds.items()}
        larger = arguments.model or save_random_qwen2(Path(scratch) / "larger", **serve_batches.MODEL)
        batches = serve_batches.compare(
            larger, arguments.device, arguments.dtype, arguments.rounds, gsm8k_file(arguments.texts)
        )
        overlap = None
        if arguments.model is None:
            overlap = serve_overlap.measure(Path(scratch) / "overlap", arguments.rounds, OVERLAP_REQUESTS)
        if arguments.model is None and arguments.budget:
            alone_ms = model_cpu_ms(model, requests)
            for result in results.values():
                result["overhead_cpu_ms"] = round(result["server_cpu_ms"] - alone_ms, 3)
    return {
        "benchmark": "serve",
        **vars(arguments),
        "model": arguments.model or "tiny random Qwen2",
        "layers": layers,
        "server_memory_mb": round(memory_mb, 1),
        **results,
        "batches": batches,
        "overlap": overlap,
        "int8_bytes_over_raw": round(results["int8"]["bytes_per_sample"] / results["raw"]["bytes_per_sample"], 4),
    }


def gsm8k_file(given: str | None) -> Path | None:
    """The file whose lengths are used: the given one, or gsm8k.jsonl in KVDISTILL_DATA_DIR if it is there."""
    if given is not None:
        return Path(given)
    file = Path(os.environ.get("KVDISTILL_DATA_DIR", ".")) / "gsm8k.jsonl"
    return file if file.is_file() else None


def _rounds(
    arguments: argparse.Namespace, teacher: ServedTeacher, requests: list[list[Sample]]
) -> dict[CodecName, list[Measured]]:
    selection = Selection(selector="r_kv", budget=arguments.budget) if arguments.budget else Selection()
    layers = tuple(range(teacher.info.layers))
    rounds: dict[CodecName, list[Measured]] = {codec: [] for codec in CODECS}
    for number in range(arguments.rounds + 1):
        for codec in CODECS:
            plan = KVPlan(layers=layers, selection=selection, codec=CodecSpec(name=codec))
            measured = measure(teacher, plan, requests)
            if number:  # The first round is warm-up.
                rounds[codec].append(measured)
                sys.stderr.write(f"{number} {codec} {json.dumps(asdict(measured))}\n")
    return rounds


def main() -> None:
    """Parses the arguments, runs the benchmark and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--model", help="a directory or hub id; a tiny random model by default")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", type=int, default=64, help="samples per request, or per batch")
    parser.add_argument("--operations", type=int, default=4, help="length of a sample's chain of operations")
    parser.add_argument("--budget", type=int, default=3, help="R-KV's budget; 0 requests the whole reasoning")
    parser.add_argument("--requests", type=int, default=20, help="requests per round and codec")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", help="GSM8K as JSON Lines, for the lengths of the comparison of batches")
    parser.add_argument("--tokens", type=int, default=480, help="tokens per sample (engine vllm)")
    arguments = parser.parse_args()
    if arguments.engine == "vllm":
        # Imported here, since the other engine does not need vLLM.
        from benchmarks import serve_vllm  # noqa: PLC0415

        result = serve_vllm.run(arguments)
    else:
        result = run(arguments)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

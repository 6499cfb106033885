"""Measures what the service adds to a model's forward pass, and what could be gained if more ran at the same time.

The same batches of 4 samples of 512 tokens run through the bare model in this process, through the server one request
at a time, and through the server with two requests at a time, so that it reads one request while the other one runs.
The plan is that of a student with half of the layers: 24 tokens of each second layer in int8. `service_over_bare` is
the throughput of one request at a time over that of the bare model, `two_over_one` that of two at a time over one.

`encode_share` is the share of the engine's time that selecting, encoding and copying take, by plan: the most that could
be gained if another thread did this while the next layer computes.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.served import ServedTeacher, save_random_qwen2, served_teacher
from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.types import EncodedSampleKV, Sample, Span
from kvcore.wire.stream_reader import StreamReader
from teacher_server.config import ServeConfig
from teacher_server.engines.base import PlannedSample, SampleFailure, TokenizedSample
from teacher_server.engines.hf import hf_engine as hf

# Large enough that a layer takes some milliseconds, as on a GPU.
MODEL = {
    "num_hidden_layers": 8,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
SAMPLES, TOKENS = 4, 512


def plans(layers: int) -> dict[str, KVPlan]:
    """The plans whose encoding is measured: that of a student first, then those that encode more."""
    every = tuple(range(layers))
    right = Selection(selector="right", budget=24, span="all")
    importance = Selection(selector="r_kv", budget=24, span="all", scope="layer")
    whole = Selection(selector="full", span="all")
    return {
        "right_24_int8_half_of_the_layers": KVPlan(layers=every[::2], selection=right),
        "r_kv_24_int8": KVPlan(layers=every, selection=importance),
        "all_tokens_bf16": KVPlan(layers=every, selection=whole, codec=CodecSpec(name="bf16")),
        "all_tokens_int4": KVPlan(layers=every, selection=whole, codec=CodecSpec(name="int4")),
    }


def batches(rounds: int) -> list[list[Sample]]:
    """Batches of samples that all differ."""

    def sample(number: int, place: int) -> Sample:
        token_ids = (number % 32 + 3, place + 3, *(3 + (number + place * 5 + at) % 32 for at in range(TOKENS - 2)))
        return Sample(f"{number}-{place}", token_ids=token_ids, spans=(Span("answer", TOKENS - 20, TOKENS),))

    return [[sample(number, place) for place in range(SAMPLES)] for number in range(rounds)]


def fetch(teacher: ServedTeacher, plan: KVPlan, samples: Sequence[Sample]) -> None:
    """Sends one request and reads the answer as a student does."""
    request_id = f"overlap-{samples[0].id}"
    reader = StreamReader(request_id, plan, samples, teacher.info)
    for frame in teacher.frames(plan, samples, request_id):
        for _, outcome in reader.feed(frame):
            if not isinstance(outcome, EncodedSampleKV):
                raise SystemExit(f"a sample failed: {outcome}")
    reader.finish()


def encode_share(engine: hf.HFEngine, tokens: Sequence[TokenizedSample], plan: KVPlan) -> float:
    """The share of encoding in the engine's time for one batch."""

    def fail(failure: SampleFailure) -> None:
        raise SystemExit(f"a sample failed: {failure.problem}")

    spent = engine.run([PlannedSample(one, plan) for one in tokens], lambda _result: None, fail, lambda _row: True)
    return spent.encode_s / (spent.encode_s + spent.prefill_s)


class Arms:
    """The ways in which the batches of a round run, by name."""

    def __init__(self, teacher: ServedTeacher, engine: hf.HFEngine, plan: KVPlan, pool: ThreadPoolExecutor) -> None:
        self._teacher, self._engine, self._plan, self._pool = teacher, engine, plan, pool

    def seconds(self, name: str, asked: Sequence[Sequence[Sample]]) -> float:
        """How long an arm takes."""
        read = [self._read(samples) for samples in asked]
        began = time.perf_counter()
        if name == "bare":
            for tokens in read:
                self._engine.prefill(tokens, self._plan.layers, False, lambda _output: None)
        elif name == "one":
            for samples in asked:
                self._fetch(samples)
        else:
            for _ in self._pool.map(self._fetch, asked):
                pass
        return time.perf_counter() - began

    def encode_share(self, asked: Sequence[Sample], plan: KVPlan) -> float:
        """See `encode_share`."""
        return encode_share(self._engine, self._read(asked), plan)

    def _read(self, samples: Sequence[Sample]) -> list[TokenizedSample]:
        return [self._engine.tokenize(sample) for sample in samples]

    def _fetch(self, samples: Sequence[Sample]) -> None:
        fetch(self._teacher, self._plan, samples)


def measure(folder: Path, rounds: int, requests: int) -> dict[str, Any]:
    """Measures all arms in turns; the first round is warm-up.

    Args:
        folder: for the model and the server's log.
        rounds: that are measured.
        requests: that each arm of a round sends.
    """
    torch.set_num_threads(1)
    model = save_random_qwen2(folder / "model", **MODEL)
    engine = hf.load(ServeConfig(model=model, device="cpu", dtype="fp32"))
    wanted = plans(engine.info.layers)
    seconds: dict[str, list[float]] = {"bare": [], "one": [], "two": []}
    shares: dict[str, list[float]] = {name: [] for name in wanted}
    with served_teacher(model, folder / "logs", "cpu", "fp32") as teacher, ThreadPoolExecutor(2) as pool:
        arms, asked = Arms(teacher, engine, next(iter(wanted.values())), pool), batches(requests)
        for number in range(rounds + 1):
            for name in seconds if number % 2 else reversed(seconds):
                elapsed = arms.seconds(name, asked)
                sys.stderr.write(f"{number} {name} {elapsed:.3f} s\n")
                seconds[name] += [elapsed] * bool(number)
            for name, plan in wanted.items():
                shares[name] += [arms.encode_share(asked[0], plan)] * bool(number)
    engine.close()
    return figures(seconds, shares, requests * SAMPLES * TOKENS)


def figures(seconds: dict[str, list[float]], shares: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """Medians of throughput and of shares, and medians of the ratios within a round."""

    def ratio(slow: str, fast: str) -> float:
        return round(statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)), 3)

    return {
        "tokens_per_s": {name: round(tokens / statistics.median(each), 1) for name, each in seconds.items()},
        "service_over_bare": ratio("bare", "one"),
        "two_over_one": ratio("one", "two"),
        "encode_share": {name: round(statistics.median(each), 4) for name, each in shares.items()},
    }

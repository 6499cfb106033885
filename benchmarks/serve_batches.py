"""Measures what padding costs a teacher: batches of samples of similar length against batches in order of arrival."""

from __future__ import annotations

import json
import random
import re
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.types import Sample, Span
from teacher_server.batch_lengths import padding
from teacher_server.config import ServeConfig
from teacher_server.engines.base import PlannedSample, SampleFailure
from teacher_server.engines.hf import hf_engine as hf
from teacher_server.plan_execution import encoded_bytes
from teacher_server.sample_queue import ClientStream, Job, SampleQueue, Sink

SAMPLES = 256
# As many requests wait as eight ranks send that do not prefetch, or two ranks that prefetch four micro-batches.
MICRO_BATCH, OPEN_REQUESTS = 8, 8
# Large enough that the model's passes take most of the time.
MODEL = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
# The token counts of GSM8K's training records: a median of 147, 5 % below 81 and 5 % above 267.
MEDIAN, SPREAD = 147, 0.36


@dataclass(frozen=True, slots=True)
class Batches:
    """One round of one way to form batches, or the medians of several. The padding share is that of all tokens."""

    tokens_per_s: float
    padding_share: float
    samples_per_batch: float


def compare(model: str, device: str, dtype: str, rounds: int, texts: Path | None) -> dict[str, object]:
    """Runs the same requests through one engine, with each way to form batches in turn.

    Args:
        model: directory or hub id.
        texts: GSM8K as JSON Lines; without it, the lengths are drawn from a similar distribution.
    """
    config = ServeConfig.model_validate({"model": model, "device": device, "dtype": dtype})
    engine = hf.load(config)
    lengths = token_counts(texts) if texts else drawn_counts()
    ways = {"by_length": engine.small_batch_tokens, "in_order": None}
    measured: dict[str, list[Batches]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, small_batch_tokens in ways.items():
            round_ = _run(engine, config, lengths, small_batch_tokens)
            if number:  # The first round is warm-up.
                measured[name].append(round_)
                sys.stderr.write(f"{number} {name} {round_}\n")
    result = {name: _medians(rounds_) for name, rounds_ in measured.items()}
    return {
        "lengths": texts.name if texts else "log-normal",
        "mean_tokens": round(statistics.mean(lengths), 1),
        **result,
        "speedup": round(result["by_length"]["tokens_per_s"] / result["in_order"]["tokens_per_s"], 3),
    }


def token_counts(texts: Path) -> list[int]:
    """The lengths of some records, with a token for each word, digit and sign."""
    with texts.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    chosen = random.Random(0).sample(rows, SAMPLES)
    # GSM8K's calculator marks are not part of the text that is read.
    read = [row["question"] + " " + re.sub(r"<<.*?>>", "", row["answer"]) for row in chosen]
    return [len(re.findall(r"[A-Za-z']+|\d|[^\w\s]", text)) for text in read]


def drawn_counts() -> list[int]:
    """Lengths distributed like those of GSM8K's records."""
    draw = random.Random(0)
    return [max(8, round(MEDIAN * draw.lognormvariate(0.0, SPREAD))) for _ in range(SAMPLES)]


def _run(engine: hf.HFEngine, config: ServeConfig, lengths: Sequence[int], small_batch_tokens: int | None) -> Batches:
    plan = KVPlan(
        layers=tuple(range(engine.info.layers)),
        selection=Selection(selector="right", budget=24),
        codec=CodecSpec(name="int8"),
    )
    planned = [PlannedSample(engine.tokenize(_sample(place, tokens)), plan) for place, tokens in enumerate(lengths)]
    requests = deque(planned[start : start + MICRO_BATCH] for start in range(0, len(planned), MICRO_BATCH))
    queue = SampleQueue(
        config.max_queued_tokens,
        config.max_batch_tokens,
        config.stream_window_bytes,
        config.max_unsent_bytes,
        small_batch_tokens,
    )
    open_jobs: dict[ClientStream, int] = {}

    def open_request() -> None:
        # Nobody reads the answers.
        stream = ClientStream(cast("Sink", None))
        jobs = [
            Job(stream, index, sample, encoded_bytes(plan, sample.tokens, engine.info))
            for index, sample in enumerate(requests.popleft())
        ]
        open_jobs[stream] = len(jobs)
        queue.extend(stream, jobs)

    for _ in range(OPEN_REQUESTS):
        open_request()
    batches: list[list[int]] = []
    started = time.perf_counter()
    while open_jobs:
        batch = queue.take()
        before = time.perf_counter()
        engine.run([job.planned for job in batch], lambda _result: None, _fail, lambda _row: True)
        queue.done(batch, time.perf_counter() - before)
        batches.append([job.tokens for job in batch])
        for job in batch:
            queue.release(job.stream, job.nbytes)
            open_jobs[job.stream] -= 1
            if not open_jobs[job.stream]:
                del open_jobs[job.stream]
                if requests:
                    open_request()
    seconds = time.perf_counter() - started
    tokens, padded = sum(lengths), sum(padding(batch) for batch in batches)
    return Batches(tokens / seconds, padded / (tokens + padded), len(lengths) / len(batches))


def _sample(place: int, tokens: int) -> Sample:
    third = tokens // 3
    spans = (Span("prompt", 0, third), Span("reasoning", third, 2 * third), Span("answer", 2 * third, tokens))
    return Sample(str(place), token_ids=tuple(3 + (31 * place + j) % 32 for j in range(tokens)), spans=spans)


def _fail(failure: SampleFailure) -> None:
    raise SystemExit(f"a sample failed: {failure.problem}")


def _medians(rounds: Sequence[Batches]) -> dict[str, float]:
    names = [entry.name for entry in fields(Batches)]
    return {name: round(statistics.median(getattr(measured, name) for measured in rounds), 4) for name in names}

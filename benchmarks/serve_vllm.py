"""Measures the cost of streaming K/V from vLLM, and when the first layer arrives.

Batches of random tokens run through one engine in turns, without a plan and with each plan; no tokens are in the prefix
cache. `cost` is the additional CPU time of all processes, relative to running without a plan (negative: noise).
`first_layer_share` is the share of a single prompt's prefill after which the first encoded layer arrived in the server
process.

`in_flight` sends several small batches at a time: tokens/s by their number, and the median ratio to one at a time
within a round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import psutil
import torch

from benchmarks.served import save_random_qwen2
from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.types import Sample, Span
from teacher_server.config import ServeConfig
from teacher_server.engines import load_engine
from teacher_server.engines.base import LayerResult, PlannedSample, TokenizedSample
from teacher_server.engines.vllm.vllm_engine import VLLMEngine

# 72M parameters. The smaller the model, the larger the share of encoding.
SMALL = {
    "num_hidden_layers": 8,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
SELECTIONS = {
    "right_24_int8": (Selection(selector="right", budget=24, span="all"), CodecSpec(name="int8")),
    "r_kv_24_int8": (Selection(selector="r_kv", budget=24, span="all", scope="layer"), CodecSpec(name="int8")),
    "full_int8": (Selection(selector="full", span="all"), CodecSpec(name="int8")),
}
SINGLE_PROMPTS = 5
# Batches at a time, and their sizes: small ones, between which vLLM would wait longest.
IN_FLIGHT = (1, 2, 4)
SHORT_BATCHES, SHORT_TOKENS = 8, 100


@dataclass(slots=True)
class Spent:
    """Wall time and CPU time of all processes in seconds, by batch."""

    wall: list[float]
    cpu: list[float]


def cpu_seconds() -> float:
    """CPU time of this process and all its descendants."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def measured(work: Callable[[], None], into: Spent) -> None:
    """Runs `work` and records its times."""
    cpu, started = cpu_seconds(), time.perf_counter()
    work()
    into.wall.append(time.perf_counter() - started)
    into.cpu.append(cpu_seconds() - cpu)


class Batches:
    """Random prompts without common prefixes."""

    def __init__(self, engine: VLLMEngine, tokens: int) -> None:
        self._engine, self._tokens = engine, tokens
        self._seeds = itertools.count()

    def next(self, samples: int) -> list[TokenizedSample]:
        """Returns a new batch."""
        return [self._prompt(random.Random(next(self._seeds))) for _ in range(samples)]

    def short(self) -> TokenizedSample:
        """A sample that takes almost no time."""
        return self._engine.tokenize(Sample("short", token_ids=(5, 6, 7)))

    def _prompt(self, rng: random.Random) -> TokenizedSample:
        token_ids = tuple(rng.randrange(3, 250) for _ in range(self._tokens))
        answer = self._tokens - max(1, self._tokens // 20)
        # The last twentieth is the answer, which R-KV ranks tokens by.
        sample = Sample(f"{rng.random()}", token_ids=token_ids, spans=(Span("answer", answer, self._tokens),))
        return self._engine.tokenize(sample)


def stream(engine: VLLMEngine, batch: Sequence[TokenizedSample], plan: KVPlan) -> tuple[float, float]:
    """Runs a batch; returns the seconds until its first layer arrived and until prefill ended."""
    started, first = time.perf_counter(), [0.0]

    def emit(_result: LayerResult) -> None:
        first[0] = first[0] or time.perf_counter() - started

    def fail(failure: object) -> None:
        raise SystemExit(f"a sample failed: {failure}")

    timings = engine.run([PlannedSample(tokens, plan) for tokens in batch], emit, fail, lambda _row: True)
    return first[0], timings.prefill_s


def in_flight(engine: VLLMEngine, plan: KVPlan, samples: int, rounds: int) -> dict[str, Any]:
    """Runs small batches one at a time and several at a time, in turns; the first round is warm-up."""
    batches = Batches(engine, SHORT_TOKENS)
    seconds: dict[int, list[float]] = {count: [] for count in IN_FLIGHT}
    for number in range(rounds + 1):
        for count in IN_FLIGHT if number % 2 else reversed(IN_FLIGHT):
            asked = [batches.next(samples) for _ in range(SHORT_BATCHES)]
            with ThreadPoolExecutor(count) as pool:
                started = time.perf_counter()
                for _ in pool.map(lambda batch: stream(engine, batch, plan), asked):
                    pass
                seconds[count] += [time.perf_counter() - started] * bool(number)
    tokens = SHORT_BATCHES * samples * SHORT_TOKENS
    return {
        str(count): {
            "tokens_per_s": round(tokens / statistics.median(each), 1),
            "over_one": round(statistics.median(a / b for a, b in zip(seconds[1], each, strict=True)), 3),
        }
        for count, each in seconds.items()
    }


def _pass(engine: VLLMEngine, batches: Batches, samples: int, plan: KVPlan | None) -> None:
    batch = batches.next(samples)
    if plan is None:
        engine.prefill_alone(batch)
    else:
        stream(engine, batch, plan)
    # K/V are complete before their forward pass ends; wait for its end.
    engine.prefill_alone([batches.short()])


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Starts vLLM and runs the benchmark."""
    samples = min(arguments.samples, 4) if arguments.model is None else arguments.samples
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model or save_random_qwen2(Path(scratch) / "model", **SMALL)
        engine = cast("VLLMEngine", load_engine(ServeConfig(model=model, engine="vllm", device=arguments.device)))
        try:
            result = _measure(engine, samples, arguments)
        finally:
            engine.close()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "benchmark": "serve",
        "engine": "vllm",
        "model": arguments.model or "random Qwen2, 72M",
        "device": device,
    } | result


def _measure(engine: VLLMEngine, samples: int, arguments: argparse.Namespace) -> dict[str, Any]:
    layers = tuple(range(engine.info.layers))
    plans = {name: KVPlan(layers=layers, selection=s, codec=c) for name, (s, c) in SELECTIONS.items()}
    batches = Batches(engine, arguments.tokens)
    spent = {name: Spent([], []) for name in ("alone", *plans)}
    for number in range(arguments.rounds + 1):
        trial = {name: Spent([], []) for name in spent} if number == 0 else spent
        names = list(spent)
        # The order rotates, so that no plan profits from the one before it.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            measured(partial(_pass, engine, batches, samples, plans.get(name)), trial[name])
        sys.stderr.write(f"{number} {json.dumps({name: round(one.wall[-1], 3) for name, one in trial.items()})}\n")
    several = in_flight(engine, plans["right_24_int8"], samples, arguments.rounds)
    sys.stderr.write(f"in flight {json.dumps(several)}\n")
    singles = [stream(engine, batches.next(1), plans["right_24_int8"]) for _ in range(SINGLE_PROMPTS + 1)][1:]
    return {
        "layers": len(layers),
        "samples": samples,
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
        **{name: _medians(one, spent["alone"], samples * arguments.tokens) for name, one in spent.items()},
        "in_flight": several,
        "first_layer_share": round(statistics.median(first / prefill for first, prefill in singles), 4),
        "first_layer_ms": round(1e3 * statistics.median(first for first, _ in singles), 2),
        "prefill_ms": round(1e3 * statistics.median(prefill for _, prefill in singles), 2),
    }


def _medians(one: Spent, alone: Spent, tokens: int) -> dict[str, float]:
    pairs = zip(one.cpu, alone.cpu, strict=True)
    return {
        "tokens_per_s": round(tokens / statistics.median(one.wall), 1),
        "cpu_s": round(statistics.median(one.cpu), 4),
        "cost": round(statistics.median(mine / theirs for mine, theirs in pairs) - 1.0, 4),
    }

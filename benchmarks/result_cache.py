"""Measures what a server's cache of results (`--cache-bytes`) saves in a second epoch, and what it costs in the first.

Two servers of the same model run: one with a cache and one without. Every round asks both for the same new samples, a
request at a time, and then the one with a cache for the same samples again. The lengths are drawn as in GSM8K. Medians
over the rounds are reported; ratios are medians of the ratios within a round. CPU time is that of the server. Prints
one JSON object as its last line.

Examples:
  python -m benchmarks.result_cache
  python -m benchmarks.result_cache --requests 2 --rounds 1
  python -m benchmarks.result_cache --model Qwen/Qwen2.5-7B --dtype bf16 --device cuda:0
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.serve import ask
from benchmarks.serve_batches import MODEL, drawn_counts
from benchmarks.served import ServedTeacher, save_random_qwen2, served_teacher
from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.types import Sample

SAMPLES_PER_REQUEST = 8
CACHE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Epoch:
    """One pass over the samples of a round."""

    samples_per_s: float
    server_cpu_ms_per_sample: float


def measure(teacher: ServedTeacher, plan: KVPlan, requests: Sequence[Sequence[Sample]]) -> Epoch:
    """Sends the requests one after the other."""
    count = sum(map(len, requests))
    cpu, started = teacher.cpu_seconds(), time.perf_counter()
    for samples in requests:
        ask(teacher, plan, samples)
    elapsed = time.perf_counter() - started
    return Epoch(count / elapsed, 1e3 * (teacher.cpu_seconds() - cpu) / count)


def requests_of(number: int, count: int) -> list[list[Sample]]:
    """The requests of one round, whose samples no other round has."""
    lengths = drawn_counts()
    requests: list[list[Sample]] = []
    for request in range(count):
        places = range(request * SAMPLES_PER_REQUEST, (request + 1) * SAMPLES_PER_REQUEST)
        requests.append([_sample(number, place, lengths[place % len(lengths)]) for place in places])
    return requests


def _sample(number: int, place: int, tokens: int) -> Sample:
    # The first tokens differ, so that no two samples are equal.
    own = [3 + number % 32, 3 + place // 32 % 32, 3 + place % 32]
    rest = [3 + (place + 7 * at) % 32 for at in range(tokens - len(own))]
    return Sample(f"{number}-{place}", token_ids=(*own, *rest))


def run(arguments: argparse.Namespace) -> dict[str, list[Epoch]]:
    """Starts both servers and measures all epochs; the first round is warm-up."""
    found: dict[str, list[Epoch]] = {"without": [], "first": [], "second": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = arguments.model or save_random_qwen2(folder / "model", **MODEL)
        given = (arguments.device, arguments.dtype)
        with (
            served_teacher(model, folder / "without", *given) as without,
            served_teacher(model, folder / "with", *given, cache_bytes=CACHE_BYTES) as cached,
        ):
            selection = Selection(selector="right", budget=24, span="all")
            layers = tuple(range(cached.info.layers))
            plan = KVPlan(layers=layers, selection=selection, codec=CodecSpec(name="int8"))
            for number in range(arguments.rounds + 1):
                requests = requests_of(number, arguments.requests)
                epochs = {
                    "without": measure(without, plan, requests),
                    "first": measure(cached, plan, requests),
                    "second": measure(cached, plan, requests),
                }
                sys.stderr.write(f"{number} {json.dumps({name: asdict(epoch) for name, epoch in epochs.items()})}\n")
                if number:
                    for name, epoch in epochs.items():
                        found[name].append(epoch)
    return found


def figures(found: dict[str, list[Epoch]]) -> dict[str, Any]:
    """The medians of each epoch, and the ratios."""

    def ratio(one: str, other: str) -> float:
        pairs = zip(found[one], found[other], strict=True)
        return round(statistics.median(a.samples_per_s / b.samples_per_s for a, b in pairs), 3)

    medians = {
        name: {
            "samples_per_s": round(statistics.median(epoch.samples_per_s for epoch in epochs), 1),
            "server_cpu_ms_per_sample": round(statistics.median(epoch.server_cpu_ms_per_sample for epoch in epochs), 2),
        }
        for name, epochs in found.items()
    }
    return medians | {"second_over_first": ratio("second", "first"), "first_over_without": ratio("first", "without")}


def main() -> None:
    """Parses the arguments, runs the benchmark and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory or hub id; a random Qwen2 of 4 layers of 256 by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--requests", type=int, default=16, help="of 8 samples, in each epoch; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up; default: %(default)s")
    arguments = parser.parse_args()
    result = {"benchmark": "result_cache", **vars(arguments), "model": arguments.model or "random Qwen2"}
    sys.stdout.write(json.dumps(result | figures(run(arguments))) + "\n")


if __name__ == "__main__":
    main()

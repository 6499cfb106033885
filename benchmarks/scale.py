"""Measures how throughput grows with replicas, ranks and teachers, with teachers whose forward pass is a sleep.

Every server is a process of its own with the engine `fake`, which waits for a time per token instead of computing. So a
machine with two cores can run eight servers at full speed, and what is measured is the service, the client and how
ranks are distributed over replicas. The ranks are threads of this process; each has the KV sources of a rank of the
trainer, with prefetching. All arms take turns in every round; medians over the rounds are reported, and ratios are
medians of the ratios within a round.

`forward_share` is the share of a perfect service's throughput: as if no server ever waited for requests. `least_share`
is the throughput of the slowest rank over that of the fastest. A machine that is busy lowers all figures. Prints one
JSON object as its last line.

Examples:
  python -m benchmarks.scale
  python -m benchmarks.scale --quick
  python -m benchmarks.scale --delay-ms 0.5 --batches 16
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.types import EncodedSampleKV, Sample, TeacherInfo
from student_trainer.config import KVConfig, TeacherConfig
from student_trainer.kv_sources import KVSource, build_source
from student_trainer.launching.local_teachers import LocalTeachers

MOST_SERVERS = 8
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What every rank requests in an arm: `batches` of `samples` with `tokens` each.

    `delay_ms`: how long a server waits for each token. `rounds`: after one that warms up.
    """

    batches: int = 8
    samples: int = 8
    tokens: int = 100
    delay_ms: float = 0.25
    rounds: int = 3


QUICK = Sizes(batches=3, rounds=1)


@dataclass(frozen=True, slots=True)
class Arm:
    """How many ranks train on how many teachers, with how many replicas each."""

    ranks: int
    replicas: int = 1
    teachers: int = 1

    @property
    def name(self) -> str:
        """Names the arm in tables."""
        return f"ranks={self.ranks},replicas={self.replicas},teachers={self.teachers}"


COUNTS = (1, 2, 4, 8)
BY_REPLICAS = tuple(Arm(8, replicas=count) for count in COUNTS)
BY_RANKS = tuple(Arm(count, replicas=8) for count in COUNTS)
ON_ONE_REPLICA = tuple(Arm(count) for count in COUNTS)
BY_TEACHERS = tuple(Arm(2, teachers=count) for count in (1, 2, 3, 5))
ARMS = tuple(dict.fromkeys((*BY_REPLICAS, *BY_RANKS, *ON_ONE_REPLICA, *BY_TEACHERS)))
# By name: how many times the throughput of the first arm the second one has.
RATIOS = {
    **{f"replicas_1_to_{arm.replicas}": (BY_REPLICAS[0], arm) for arm in BY_REPLICAS[1:]},
    **{f"ranks_1_to_{arm.ranks}": (BY_RANKS[0], arm) for arm in BY_RANKS[1:]},
    **{f"ranks_1_to_{arm.ranks}_on_one_replica": (ON_ONE_REPLICA[0], arm) for arm in ON_ONE_REPLICA[1:]},
    **{f"teachers_1_to_{arm.teachers}": (BY_TEACHERS[0], arm) for arm in BY_TEACHERS[1:]},
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One round of one arm. A sample counts once, however many teachers read it."""

    samples_per_s: float
    least_share: float


def plan_for(info: TeacherInfo) -> KVPlan:
    """The 24 last tokens of every layer, in int8."""
    selection = Selection(selector="right", budget=24, span="all")
    return KVPlan(layers=tuple(range(info.layers)), selection=selection, codec=CodecSpec(name="int8"))


def batches_of(rank: int, sizes: Sizes) -> list[list[Sample]]:
    """The batches of one rank. Each rank has samples of its own, as in data-parallel training."""

    def sample(number: int) -> Sample:
        own = (rank, number // 250, number % 250)
        token_ids = (*own, *((number + place * 7) % 250 for place in range(sizes.tokens - len(own))))
        return Sample(f"rank{rank}-{number}", token_ids=token_ids)

    numbers = [range(start, start + sizes.samples) for start in range(0, sizes.batches * sizes.samples, sizes.samples)]
    return [[sample(number) for number in batch] for batch in numbers]


class Rank:
    """One rank: a KV source for each teacher.

    Args:
        arm: that it is part of.
        number: of the rank.
        endpoints: of the servers. The replicas of a teacher follow one another.
        sizes: what it requests.
    """

    def __init__(self, arm: Arm, number: int, endpoints: Sequence[str], sizes: Sizes) -> None:
        self._batches = batches_of(number, sizes)
        self._sources: list[KVSource] = []
        try:
            for place in range(arm.teachers):
                own = tuple(endpoints[place * arm.replicas : (place + 1) * arm.replicas])
                teacher = TeacherConfig(name=f"teacher{place}", endpoints=own)
                self._sources.append(build_source(teacher, KVConfig(), plan_for, number, arm.ranks))
        except BaseException:
            self.close()
            raise

    def train(self) -> float:
        """Reads all batches as a trainer does, whose steps take no time; returns the seconds."""
        started = time.perf_counter()
        pending = [[source.submit(batch) for source in self._sources] for batch in self._batches]
        for step in pending:
            for answer in step:
                if wrong := [one for one in answer.result() if not isinstance(one, EncodedSampleKV)]:
                    raise SystemExit(f"a sample failed: {wrong[0]}")
        return time.perf_counter() - started

    def close(self) -> None:
        """Ends the sources."""
        for source in self._sources:
            source.close()


def measure(ranks: Sequence[Rank], sizes: Sizes) -> Measured:
    """Lets all ranks of an arm train at the same time."""
    together = threading.Barrier(len(ranks) + 1)

    def train(rank: Rank) -> float:
        together.wait()
        return rank.train()

    with ThreadPoolExecutor(len(ranks)) as pool:
        running = [pool.submit(train, rank) for rank in ranks]
        together.wait()
        started = time.perf_counter()
        seconds = [one.result() for one in running]
        elapsed = time.perf_counter() - started
    return Measured(len(ranks) * sizes.batches * sizes.samples / elapsed, min(seconds) / max(seconds))


def figures(arm: Arm, rounds: Sequence[Measured], sizes: Sizes) -> dict[str, Any]:
    """The medians of one arm."""
    rate = statistics.median(one.samples_per_s for one in rounds)
    perfect = min(arm.ranks, arm.replicas) * 1e3 / (sizes.delay_ms * sizes.tokens)
    return {
        **asdict(arm),
        "samples_per_s": round(rate, 1),
        "forward_share": round(rate / perfect, 3),
        "least_share": round(statistics.median(one.least_share for one in rounds), 3),
    }


def ratios(found: dict[Arm, list[Measured]]) -> dict[str, float]:
    """The median ratio of two arms within a round, for each entry of RATIOS."""
    return {
        name: round(
            statistics.median(
                more.samples_per_s / less.samples_per_s for less, more in zip(found[one], found[other], strict=True)
            ),
            3,
        )
        for name, (one, other) in RATIOS.items()
    }


@contextmanager
def servers(folder: Path, sizes: Sizes) -> Iterator[list[str]]:
    """Runs the servers, with equal models; yields their endpoints."""
    model = f"fake:layers=4,heads=2,dim=16,delay_ms={sizes.delay_ms}"
    models = {f"server{number}": model for number in range(MOST_SERVERS)}
    options = {"engine": "fake"}
    with LocalTeachers(models, folder, device="cpu", options=options, environment=ONE_THREAD) as endpoints:
        yield list(endpoints.values())


def run(sizes: Sizes, arms: Sequence[Arm] = ARMS) -> dict[Arm, list[Measured]]:
    """Starts the servers and measures all arms in turns; the first round is warm-up."""
    found: dict[Arm, list[Measured]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder, servers(Path(folder), sizes) as endpoints, ExitStack() as stack:
        ranks: dict[Arm, list[Rank]] = {arm: [] for arm in arms}
        for arm in arms:
            for number in range(arm.ranks):
                ranks[arm].append(Rank(arm, number, endpoints, sizes))
                stack.callback(ranks[arm][-1].close)
        for number in range(sizes.rounds + 1):
            for arm in arms if number % 2 == 0 else reversed(arms):
                measured = measure(ranks[arm], sizes)
                sys.stderr.write(f"{number} {arm.name} {json.dumps(asdict(measured))}\n")
                if number:
                    found[arm].append(measured)
    return found


def main() -> None:
    """Parses the arguments, runs the benchmark and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few batches, to check the script")
    for name, what in (
        ("batches", "of each rank in each arm"),
        ("samples", "per batch"),
        ("tokens", "per sample"),
        ("rounds", "of all arms, after one that warms up"),
    ):
        parser.add_argument(f"--{name}", type=int, help=f"{what}; default: {getattr(Sizes(), name)}")
    parser.add_argument("--delay-ms", type=float, help=f"of a server for each token; default: {Sizes().delay_ms}")
    given = vars(parser.parse_args())
    changes = {name: value for name, value in given.items() if name != "quick" and value is not None}
    sizes = replace(QUICK if given["quick"] else Sizes(), **changes)
    found = run(sizes)
    arms = [figures(arm, rounds, sizes) for arm, rounds in found.items()]
    result = {"benchmark": "scale", **asdict(sizes), "arms": arms, "ratios": ratios(found)}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

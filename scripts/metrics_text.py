"""Prints what a teacher server or a trainer says on /metrics, for promtool and the like.

It starts a server without a model. The trainer's figures are made up; what it says of its teacher comes from there.

Examples:
  python -m scripts.metrics_text server | promtool check metrics
  python -m scripts.metrics_text trainer | promtool check metrics
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from kvcore.config import parse
from kvcore.plan import KVPlan, Selection
from kvcore.types import Sample
from student_trainer.config import TrainConfig
from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.kv_sources.kv_batch import STAGES, TeacherSums
from student_trainer.kv_sources.remote import RemoteSource
from student_trainer.launching.local_teachers import find_event
from student_trainer.launching.processes import end, start_logged, tail
from student_trainer.monitoring.run_metrics import FIGURES, RunMetrics
from student_trainer.monitoring.run_state import RunState

READY_SECONDS = 60.0
SAMPLES = [Sample(f"sample{number}", token_ids=tuple(range(number, number + 8))) for number in range(4)]
PLAN = KVPlan(layers=(0, 1), selection=Selection(selector="right", budget=4, span="all"))


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("server", "trainer"))
    which = parser.parse_args().which
    with fake_teacher() as ready, answering(f"127.0.0.1:{ready['grpc_port']}") as source:
        if which == "server":
            sys.stdout.write(httpx.get(f"http://127.0.0.1:{ready['http_port']}/metrics").raise_for_status().text)
        else:
            sys.stdout.write(trainer_text(source))
    return 0


@contextlib.contextmanager
def fake_teacher() -> Iterator[dict[str, Any]]:
    """A server process; gives its event `ready`, which has its ports."""
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "serve.log"
        model = ("--engine", "fake", "--model", "fake:layers=2,heads=1,dim=8")
        server = start_logged([sys.executable, "-m", "kvdistill", "serve", *model], log)
        try:
            give_up_at = time.monotonic() + READY_SECONDS
            while (ready := find_event(log, "ready")) is None:
                if server.poll() is not None or time.monotonic() > give_up_at:
                    raise SystemExit(f"the server is not ready:\n{tail(log)}")
                time.sleep(0.1)
            yield ready
        finally:
            end(server)


@contextlib.contextmanager
def answering(endpoint: str) -> Iterator[FailoverSource]:
    """A teacher that has answered a request."""
    source = FailoverSource("teacher_a", [RemoteSource("teacher_a", endpoint, lambda _: PLAN)], READY_SECONDS)
    try:
        source.connect()
        source.fetch(SAMPLES)
        yield source
    finally:
        source.close()


def trainer_text(source: FailoverSource) -> str:
    """A trainer's metrics with a value for each."""
    tree = {"student": {"path": "student"}, "data": {"train": "train.jsonl"}, "run": {"output_dir": "run", "steps": 9}}
    state = RunState()
    state.connected({"teacher_a": source})
    state.begin(9, 0)
    state.stepped(1, len(SAMPLES))
    state.log(1, dict.fromkeys([*FIGURES, "train/loss", "train/kv_loss", "routing/weights_mean/teacher_a"], 0.5))
    sums = TeacherSums(len(SAMPLES), 0, 4096, dict.fromkeys(STAGES, 0.5))
    state.account(1.0, {"stall": 0.5}, {"teacher_a": sums})
    return RunMetrics(parse(tree, TrainConfig), state).render().decode()


if __name__ == "__main__":
    sys.exit(main())

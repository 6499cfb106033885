"""Prints the text that a teacher server or a trainer gives on /metrics, for tools such as promtool.

It starts a server with the fake engine. The trainer's values are made up, except those about its teacher.

Examples:
  python -m scripts.metrics_text server | promtool check metrics
  python -m scripts.metrics_text trainer | promtool check metrics
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import httpx

from kvcore.config import parse
from kvcore.plan import KVPlan, Selection
from kvcore.types import Sample
from student_trainer.config import TrainConfig
from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.kv_sources.kv_batch import STAGES, TeacherSums
from student_trainer.kv_sources.remote import RemoteSource
from student_trainer.launching.local_teachers import LocalTeachers
from student_trainer.launching.teacher_servers import find_event
from student_trainer.monitoring.run_metrics import FIGURES, RunMetrics
from student_trainer.monitoring.run_state import RunState

NAME = "teacher_a"
MODEL = "fake:layers=2,heads=1,dim=8"
SECONDS = 60.0
SAMPLES = [Sample(f"sample{number}", token_ids=tuple(range(number, number + 8))) for number in range(4)]
PLAN = KVPlan(layers=(0, 1), selection=Selection(selector="right", budget=4, span="all"))


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("server", "trainer"))
    which = parser.parse_args().which
    with (
        tempfile.TemporaryDirectory() as scratch,
        LocalTeachers({NAME: MODEL}, Path(scratch), options={"engine": "fake"}, ready_seconds=SECONDS) as endpoints,
        closing(FailoverSource(NAME, [RemoteSource(NAME, endpoints[NAME], lambda _: PLAN)], SECONDS)) as source,
    ):
        source.connect()
        source.fetch(SAMPLES)
        ready = find_event(Path(scratch) / f"serve_{NAME}.log", "ready")
        assert ready is not None
        if which == "server":
            sys.stdout.write(httpx.get(f"http://127.0.0.1:{ready['http_port']}/metrics").raise_for_status().text)
        else:
            sys.stdout.write(trainer_text(source))
    return 0


def trainer_text(source: FailoverSource) -> str:
    """A trainer's metrics, each with a value."""
    tree = {"student": {"path": "student"}, "data": {"train": "train.jsonl"}, "run": {"output_dir": "run", "steps": 9}}
    state = RunState()
    state.connected({NAME: source})
    state.begin(9, 0)
    state.stepped(1, len(SAMPLES))
    state.log(1, dict.fromkeys([*FIGURES, "train/loss", "train/kv_loss", f"routing/weights_mean/{NAME}"], 0.5))
    sums = TeacherSums(len(SAMPLES), 0, 4096, dict.fromkeys(STAGES, 0.5))
    state.account(1.0, {"stall": 0.5}, {NAME: sums})
    return RunMetrics(parse(tree, TrainConfig), state).render().decode()


if __name__ == "__main__":
    sys.exit(main())

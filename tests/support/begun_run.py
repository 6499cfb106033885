"""The state of a run after its first step, for tests of the page, the terminal and the metrics."""

from __future__ import annotations

from collections.abc import Mapping

from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.monitoring.run_state import RunState
from tests.support.kv_fakes import MemorySource, samples
from tests.support.scripted_replica import ScriptedReplica


def half_dead_teacher() -> FailoverSource:
    """A teacher with two replicas, the first of them down, that has answered a request."""
    dead, alive = ScriptedReplica("dead:1"), ScriptedReplica("alive:2")
    dead.up = False
    live = FailoverSource("ada", [dead, alive], patience_s=5.0)
    live.connect()
    live.fetch(samples(2))
    return live


def begun_run(name: str, figures: Mapping[str, float]) -> RunState:
    """A run after the first of ten steps: teacher `name` has one of two replicas down, and `ben` reads a store."""
    state = RunState()
    state.connected({name: half_dead_teacher(), "ben": MemorySource()})
    state.begin(10, first_step=0)
    state.phase = "training"
    state.stepped(1, 64)
    state.log(1, dict(figures))
    return state

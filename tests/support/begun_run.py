"""A run's state after its first step, for what shows it: the page, the terminal, the metrics."""

from __future__ import annotations

from collections.abc import Mapping

from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.monitoring.run_state import RunState
from tests.support.kv_fakes import MemorySource, samples
from tests.support.scripted_replica import ScriptedReplica


def half_dead_teacher() -> FailoverSource:
    """Two replicas, the first of them dead, that have answered."""
    dead, alive = ScriptedReplica("dead:1"), ScriptedReplica("alive:2")
    dead.up = False
    live = FailoverSource("ada", [dead, alive], patience_s=5.0)
    live.connect()
    live.fetch(samples(2))
    return live


def begun_run(name: str, figures: Mapping[str, float]) -> RunState:
    """After one of ten steps; a teacher of this name with one of two replicas dead, and `ben` from a store."""
    state = RunState()
    state.connected({name: half_dead_teacher(), "ben": MemorySource()})
    state.begin(10, first_step=0)
    state.phase = "training"
    state.stepped(1, 64)
    state.log(1, dict(figures))
    return state

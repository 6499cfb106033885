"""The state of a run on rank 0. The progress line, the page and /metrics read it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import Literal

from kvcore.monitoring.charts import Event, EventKind
from student_trainer.kv_sources import KVSource, SourceHealth
from student_trainer.kv_sources.kv_batch import TEACHER_STAGES, TeacherSums

Phase = Literal["starting", "training", "validating", "saving", "done", "failed"]
PHASES: tuple[Phase, ...] = ("starting", "training", "validating", "saving", "done", "failed")
# The stages of a step. `store` is a stall while reading the store from disk.
BOTTLENECKS = ("queue", "prefill", "encode", "network", "store", "decode", "align", "train")
OWN_STAGES = ("stall", "decode", "align", "train")
# Points kept per curve. Beyond it every other point is dropped, so that memory does not grow with the run.
MAX_POINTS = 2000
_SWITCHES = "kv/switches/"


@dataclass(frozen=True, slots=True)
class TeacherView:
    """One teacher.

    `sums`: over all ranks since this process started. `weight`: its share in the fusion, None until the first logged
    step. `health`: of its replicas as rank 0 sees them, None if K/V come from a store.
    """

    sums: TeacherSums
    weight: float | None
    health: SourceHealth | None


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the student answered to one sample of the last validation."""

    prompt: str
    expected: str
    answer: str
    correct: bool


@dataclass(slots=True)
class RunProgress:
    """How far a run is. Times are Unix seconds.

    `doing`: the current part of the phase and its progress. `samples`: of all ranks since this process started.
    `bottleneck`: one of `BOTTLENECKS` for the last logged steps. `problem`: what ended a run that failed.
    """

    phase: Phase = "starting"
    doing: str | None = None
    step: int = 0
    steps: int = 0
    samples: int = 0
    started_at: float = field(default_factory=time.time)
    last_step_at: float | None = None
    bottleneck: str | None = None
    problem: str | None = None


@dataclass(slots=True, kw_only=True)
class RunSnapshot(RunProgress):
    """The run at one moment.

    `eta_seconds`: until the last step at the average pace, None before the first step. `scalars`, `history`: the last
    value, and (step, value) pairs, of every logged metric. `busy_seconds`: rank 0's time by `OWN_STAGES`. `events`: of
    this process.
    """

    eta_seconds: float | None
    scalars: dict[str, float]
    history: dict[str, list[tuple[int, float]]]
    teachers: dict[str, TeacherView]
    busy_seconds: dict[str, float]
    events: list[Event]
    predictions: list[Prediction]


@dataclass(slots=True)
class RunState(RunProgress):
    """The current state of a run. The training thread writes it, and others read it through `snapshot`.

    `on_terminal`: whether a terminal shows the run live.
    """

    on_terminal: bool = False
    _first_step: int = 0
    _began: float = field(default_factory=time.monotonic)
    _scalars: dict[str, float] = field(default_factory=dict)
    _history: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    _busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(OWN_STAGES, 0.0))
    _events: list[Event] = field(default_factory=list)
    _predictions: list[Prediction] = field(default_factory=list)
    _sums: dict[str, TeacherSums] = field(default_factory=dict)
    _sources: dict[str, KVSource] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def connected(self, sources: Mapping[str, KVSource]) -> None:
        """Sets the run's sources, by teacher."""
        with self._lock:
            self._sources = dict(sources)
            self._sums = {name: TeacherSums() for name in sources}

    def begin(self, steps: int, first_step: int) -> None:
        """Marks the start of training after `first_step` steps; the pace is measured from here."""
        with self._lock:
            self.step = self._first_step = first_step
            self.steps = steps
            self._began = time.monotonic()

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Sets the phase inside the block, and restores the previous phase at its end, except after an error."""
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    def stepped(self, step: int, samples: int) -> None:
        """Counts one optimiser step. `samples`: of all ranks."""
        with self._lock:
            self.step = step
            self.samples += samples
            self.last_step_at = time.time()

    def log(self, step: int, metrics: Mapping[str, float], *, earlier_process: bool = False) -> None:
        """Keeps metrics under the names of docs/monitoring.md.

        Those that an earlier process logged of the same run continue its curves, but are not current values.
        """
        with self._lock:
            if not earlier_process:
                self._note_failovers(step, metrics)
                self._scalars |= metrics
            for name, value in metrics.items():
                points = self._history.setdefault(name, [])
                points.append((step, value))
                if len(points) > MAX_POINTS:
                    del points[1::2]

    def _note_failovers(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, count in metrics.items():
            if name.startswith(_SWITCHES) and count > self._scalars.get(name, 0):
                self._events.append(Event(step, "failover", f"failover of {name.removeprefix(_SWITCHES)}"))

    def note(self, kind: EventKind, text: str) -> None:
        """Marks an event after the current step."""
        with self._lock:
            self._events.append(Event(self.step, kind, text))

    def validated(self, predictions: Sequence[Prediction]) -> None:
        """Keeps samples of the last validation."""
        with self._lock:
            self._predictions = list(predictions)

    def account(self, seconds: float, stages: Mapping[str, float], by_teacher: Mapping[str, TeacherSums]) -> None:
        """Adds rank 0's time, in total and by stage, and what each teacher sent to all ranks."""
        own = {stage: stages.get(stage, 0.0) for stage in OWN_STAGES}
        own["train"] = max(0.0, seconds - sum(own.values()))
        with self._lock:
            for stage, spent in own.items():
                self._busy[stage] += spent
            for name, sums in by_teacher.items():
                self._sums[name] += sums
            self.bottleneck = bottleneck(own, stages)

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the last step at the average pace; None before the first step."""
        done = self.step - self._first_step
        if done <= 0:
            return None
        return (time.monotonic() - self._began) / done * (self.steps - self.step)

    def down(self) -> list[str]:
        """For each teacher with a failed replica, how many of its replicas are up."""
        found = {name: source.health() for name, source in self._sources.items()}
        counts = {name: [one.problem is None for one in view.endpoints] for name, view in found.items() if view}
        return [f"{name} {sum(up)}/{len(up)} up" for name, up in counts.items() if not all(up)]

    def snapshot(self) -> RunSnapshot:
        """A copy of the current state."""
        with self._lock:
            teachers = {
                name: TeacherView(self._sums[name], self._scalars.get(f"routing/weights_mean/{name}"), source.health())
                for name, source in self._sources.items()
            }
            return RunSnapshot(
                **{one.name: getattr(self, one.name) for one in fields(RunProgress)},
                eta_seconds=self.eta_seconds,
                scalars=dict(self._scalars),
                history={name: list(points) for name, points in self._history.items()},
                teachers=teachers,
                busy_seconds=dict(self._busy),
                events=list(self._events),
                predictions=list(self._predictions),
            )


# This process's run; None outside of one.
current_run: ContextVar[RunState | None] = ContextVar("current_run", default=None)


def bottleneck(own: Mapping[str, float], stages: Mapping[str, float]) -> str:
    """The stage that took most of the time. A stall is attributed to the teachers' longest stage.

    Args:
        own: the training thread's seconds by `OWN_STAGES`, which add up to all of its time.
        stages: seconds by stage. The teachers' stages overlap with training and with one another.
    """
    longest = max(own, key=lambda stage: own[stage])
    if longest != "stall":
        return longest
    of_teachers = {stage: stages.get(stage, 0.0) for stage in TEACHER_STAGES}
    return max(of_teachers, key=lambda stage: of_teachers[stage]) if any(of_teachers.values()) else "store"

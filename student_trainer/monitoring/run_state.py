"""What rank 0 knows of its run while it goes on: one record that the progress line, the page and /metrics read."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

from student_trainer.kv_sources import SourceHealth, health
from student_trainer.kv_sources.base import KVSource
from student_trainer.loop.metric_accumulator import TEACHER_STAGES, TeacherSums

Phase = Literal["starting", "training", "validating", "saving", "done", "failed"]
PHASES: tuple[Phase, ...] = ("starting", "training", "validating", "saving", "done", "failed")
# Where a step's time can go. `store` is a stall in reading a store from disk, where no teacher is asked.
BOTTLENECKS = ("queue", "prefill", "encode", "network", "store", "decode", "align", "train")
OWN_STAGES = ("stall", "decode", "align", "train")
# Points of one curve; beyond it every other one is dropped, so that a long run costs no more than a short one.
MOST_POINTS = 2000


@dataclass(frozen=True, slots=True)
class TeacherView:
    """One teacher: sums over all ranks since this process started, its weight, and how rank 0 reaches it.

    `seconds`: by stage (queue, prefill, encode, network, decode, stall). `weight`: its share in the fusion, None until
    the first logged step. `health`: None where K/V come from a store.
    """

    sums: TeacherSums
    weight: float | None
    health: SourceHealth | None


@dataclass(frozen=True, slots=True)
class RunSnapshot:
    """The run at one moment. Times of day are Unix seconds; `history` holds (step, value) of every logged figure.

    `doing`: a long part of the phase, and how far it is. `busy_seconds`: rank 0's time by `OWN_STAGES`. `bottleneck`:
    one of `BOTTLENECKS` for the last logged steps. `eta_seconds`: until the last step at the pace so far, None before
    the first step.
    """

    phase: Phase
    doing: str | None
    step: int
    steps: int
    samples: int
    started_at: float
    last_step_at: float | None
    eta_seconds: float | None
    scalars: dict[str, float]
    history: dict[str, list[tuple[int, float]]]
    teachers: dict[str, TeacherView]
    busy_seconds: dict[str, float]
    bottleneck: str | None


@dataclass(slots=True)
class RunState:
    """Fed by the training thread, read from others through `snapshot`.

    `doing`: a long part of the phase, and how far it is. `drawn`: a terminal shows all this as it goes.
    """

    phase: Phase = "starting"
    step: int = 0
    steps: int = 0
    samples: int = 0
    started_at: float = field(default_factory=time.time)
    last_step_at: float | None = None
    bottleneck: str | None = None
    doing: str | None = None
    drawn: bool = False
    _first_step: int = 0
    _began: float = field(default_factory=time.monotonic)
    _scalars: dict[str, float] = field(default_factory=dict)
    _history: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    _busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(OWN_STAGES, 0.0))
    _sums: dict[str, TeacherSums] = field(default_factory=dict)
    _sources: dict[str, KVSource] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def connected(self, sources: Mapping[str, KVSource]) -> None:
        """Takes the run's teachers by name."""
        with self._lock:
            self._sources = dict(sources)
            self._sums = {name: TeacherSums() for name in sources}

    def begin(self, steps: int, first_step: int) -> None:
        """The first step comes next; the pace counts from here."""
        with self._lock:
            self.step = self._first_step = first_step
            self.steps = steps
            self._began = time.monotonic()

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """The run is in this phase for a while, then in the one it was in."""
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    def stepped(self, step: int, samples: int) -> None:
        """One optimiser step on so many samples of all ranks is done."""
        with self._lock:
            self.step = step
            self.samples += samples
            self.last_step_at = time.time()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Keeps logged figures, under the names of docs/monitoring.md."""
        with self._lock:
            self._scalars |= figures
            self._keep(step, figures)

    def recall(self, step: int, figures: Mapping[str, float]) -> None:
        """Keeps what an earlier process logged of the same run: its curves go on, while its figures are past."""
        with self._lock:
            self._keep(step, figures)

    def _keep(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            points = self._history.setdefault(name, [])
            points.append((step, value))
            if len(points) > MOST_POINTS:
                del points[1::2]

    def account(self, seconds: float, stages: Mapping[str, float], by_teacher: Mapping[str, TeacherSums]) -> None:
        """Adds some steps: rank 0's time in all and by stage, and what each teacher sent to all ranks."""
        own = {stage: stages.get(stage, 0.0) for stage in OWN_STAGES}
        own["train"] = max(0.0, seconds - sum(own.values()))
        with self._lock:
            for stage, spent in own.items():
                self._busy[stage] += spent
            for name, sums in by_teacher.items():
                self._sums[name] = self._sums[name].plus(sums)
            self.bottleneck = bottleneck(own, stages)

    @property
    def eta_seconds(self) -> float | None:
        """Until the last step at the pace so far; None before the first step."""
        done = self.step - self._first_step
        if done <= 0:
            return None
        return (time.monotonic() - self._began) / done * (self.steps - self.step)

    def down(self) -> list[str]:
        """Says of each teacher with replicas that do not answer how many do."""
        found = {name: health(source) for name, source in self._sources.items()}
        counts = {name: [one.problem is None for one in view.endpoints] for name, view in found.items() if view}
        return [f"{name} {sum(up)}/{len(up)} up" for name, up in counts.items() if not all(up)]

    def snapshot(self) -> RunSnapshot:
        """A copy that nobody changes any more."""
        with self._lock:
            teachers = {
                name: TeacherView(
                    self._sums[name], self._scalars.get(f"routing/weights_mean/{name}"), health(self._sources[name])
                )
                for name in self._sources
            }
            return RunSnapshot(
                self.phase,
                self.doing,
                self.step,
                self.steps,
                self.samples,
                self.started_at,
                self.last_step_at,
                self.eta_seconds,
                dict(self._scalars),
                {name: list(points) for name, points in self._history.items()},
                teachers,
                dict(self._busy),
                self.bottleneck,
            )


# The run that this process is at; None outside of any.
current_run: ContextVar[RunState | None] = ContextVar("current_run", default=None)


def bottleneck(own: Mapping[str, float], stages: Mapping[str, float]) -> str:
    """The stage that most of the time went to; a stall is charged to the teachers' longest stage.

    Args:
        own: the training thread's seconds by `OWN_STAGES`, which add up to all of its time.
        stages: seconds by stage; the teachers' overlap with training and with one another.
    """
    longest = max(own, key=lambda stage: own[stage])
    if longest != "stall":
        return longest
    return _longest([(stage, stages.get(stage, 0.0)) for stage in TEACHER_STAGES]) or "store"


def _longest(stages: Sequence[tuple[str, float]]) -> str | None:
    name, seconds = max(stages, key=lambda pair: pair[1])
    return name if seconds > 0 else None

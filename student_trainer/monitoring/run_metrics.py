"""A run's Prometheus metrics, made from the same state as the page (docs/observability.md)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from student_trainer.config import TrainConfig
from student_trainer.kv_sources.kv_batch import STAGES
from student_trainer.monitoring.run_state import BOTTLENECKS, OWN_STAGES, PHASES, RunSnapshot, RunState, TeacherView

# The creation time of every counter would double the scraped series for no use.
disable_created_metrics()

PREFIX = "kvdistill_train_"
# Logged metrics with a Prometheus metric of their own: its name and help text.
FIGURES = {
    "train/lr": ("learning_rate", "The optimiser's learning rate."),
    "train/epoch": ("epoch", "Passes over the training samples begun, from 0."),
    "train/samples_per_second": ("samples_per_second", "Samples of all ranks per second, over the last logged steps."),
    "kv/stall_fraction": (
        "stall_ratio",
        "Share of the time that ranks waited for teachers, over the last logged steps.",
    ),
    "kv/bytes_per_sample": ("sample_bytes", "Encoded K/V of all teachers for one sample."),
    "routing/entropy": (
        "routing_entropy_nats",
        "Entropy of the routing weights: log(teachers) if all are equal, 0 if one teacher has all the weight.",
    ),
    "val/loss": ("validation_loss", "The loss on validation samples."),
    "val/kv_loss": ("validation_kv_loss", "The normalised KV error on validation samples; 1 is predicting the mean."),
    "val/task_metrics/accuracy": ("validation_accuracy_ratio", "Share of validation samples answered exactly."),
}
LOSS_PREFIX = "train/"
Values = Iterator[tuple[tuple[str, ...], float]]


class RunMetrics(Collector):
    """Turns the run's state into metrics when scraped. Counters start with the process."""

    def __init__(self, config: TrainConfig, state: RunState) -> None:
        self._config, self._state = config, state
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(self)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Every metric that has a value."""
        run = self._state.snapshot()
        yield self._info()
        yield from _progress(run)
        yield from _figures(run)
        yield from _teachers(run.teachers)
        yield from _disk(self._config.run.output_dir)

    def _info(self) -> Metric:
        config = self._config
        labels = {
            "run": config.run.output_dir.name,
            "student_mode": config.student.mode,
            "kv_mode": config.kv.mode,
            "fuse": config.fuse.kind,
        }
        return InfoMetricFamily(f"{PREFIX}run", "Name and modes of the run.", value=labels)


def _gauge(name: str, text: str, labels: tuple[str, ...], values: Values) -> Metric:
    return _filled(GaugeMetricFamily(PREFIX + name, text, labels=labels), values)


def _counter(name: str, text: str, labels: tuple[str, ...], values: Values) -> Metric:
    return _filled(CounterMetricFamily(PREFIX + name, text, labels=labels), values)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Values) -> Metric:
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family


def _one(value: float | None) -> Values:
    if value is not None:
        yield (), value


def _chosen(choices: tuple[str, ...], chosen: str | None) -> Values:
    for choice in choices:
        yield (choice,), float(choice == chosen)


def _progress(run: RunSnapshot) -> Iterator[Metric]:
    yield _gauge("phase", "1 for the current phase, 0 for the others.", ("phase",), _chosen(PHASES, run.phase))
    yield _gauge("step", "Optimiser steps done, those before a resume included.", (), _one(run.step))
    yield _gauge("planned_steps", "Optimiser steps of the whole run.", (), _one(run.steps))
    yield _counter("samples_total", "Samples of all ranks trained on.", (), _one(run.samples))
    yield _gauge("start_timestamp_seconds", "When this process began.", (), _one(run.started_at))
    yield _gauge("last_step_timestamp_seconds", "When the last step ended.", (), _one(run.last_step_at))
    yield _gauge("eta_seconds", "Seconds until the last step at the average pace.", (), _one(run.eta_seconds))
    yield _counter(
        "busy_seconds_total",
        "Time of rank 0's training thread by stage, as of the last logged step.",
        ("stage",),
        (((stage,), run.busy_seconds[stage]) for stage in OWN_STAGES),
    )
    yield _gauge(
        "bottleneck",
        "1 for the longest stage of the last logged steps, 0 for the others.",
        ("stage",),
        _chosen(BOTTLENECKS, run.bottleneck),
    )


def _figures(run: RunSnapshot) -> Iterator[Metric]:
    own = {figure for figure in FIGURES if figure.startswith(LOSS_PREFIX)}
    losses = {name: value for name, value in run.scalars.items() if name.startswith(LOSS_PREFIX) and name not in own}
    yield _gauge(
        "loss",
        "Training losses by part (docs/metrics.md), mean over the last logged steps.",
        ("part",),
        (((name.removeprefix(LOSS_PREFIX),), value) for name, value in losses.items()),
    )
    for figure, (name, text) in FIGURES.items():
        yield _gauge(name, text, (), _one(run.scalars.get(figure)))


def _teachers(teachers: dict[str, TeacherView]) -> Iterator[Metric]:
    def each(value: Callable[[TeacherView], float | None]) -> Values:
        for name, view in teachers.items():
            found = value(view)
            if found is not None:
                yield (name,), found

    label = ("teacher",)
    yield _gauge("teacher_weight_ratio", "The teacher's mean share in the fusion.", label, each(lambda t: t.weight))
    yield _counter("teacher_samples_total", "Samples with K/V, all ranks.", label, each(lambda t: t.sums.samples))
    yield _counter(
        "teacher_missing_samples_total", "Samples without K/V, all ranks.", label, each(lambda t: t.sums.missing)
    )
    yield _counter(
        "teacher_received_bytes_total", "Encoded K/V, all ranks.", label, each(lambda t: t.sums.encoded_bytes)
    )
    yield _counter(
        "teacher_stage_seconds_total",
        "Time by stage, summed over samples and ranks: queue, prefill, encode and network for each sample; decode and "
        "stall (waiting) for each micro-batch.",
        ("teacher", "stage"),
        (((name, stage), view.sums.seconds[stage]) for name, view in teachers.items() for stage in STAGES),
    )
    yield from _health(teachers)


def _health(teachers: dict[str, TeacherView]) -> Iterator[Metric]:
    healths = {name: view.health for name, view in teachers.items() if view.health is not None}
    yield _gauge(
        "teacher_staleness_seconds",
        "Time since the teacher last answered rank 0.",
        ("teacher",),
        (((name,), h.answered_s_ago) for name, h in healths.items() if h.answered_s_ago is not None),
    )
    for name, text in (
        ("switches", "Switches of rank 0 to another replica."),
        ("retries", "Requests that rank 0 repeated."),
    ):
        values = (((teacher,), float(getattr(health, name))) for teacher, health in healths.items())
        yield _counter(f"teacher_{name}_total", text, ("teacher",), values)
    yield _gauge(
        "teacher_endpoint_up",
        "0 if the replica failed rank 0's last request, else 1. It gets no request while another replica answers.",
        ("teacher", "endpoint"),
        (((name, one.endpoint), float(one.problem is None)) for name, h in healths.items() for one in h.endpoints),
    )


def _disk(output_dir: Path) -> Iterator[Metric]:
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    usage = shutil.disk_usage(existing)
    yield _gauge("disk_free_bytes", "Free space where run.output_dir is.", (), _one(usage.free))
    yield _gauge("disk_size_bytes", "Size of the disk where run.output_dir is.", (), _one(usage.total))

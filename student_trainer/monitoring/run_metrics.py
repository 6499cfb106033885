"""A run's Prometheus metrics, made from the same state as the page (docs/monitoring.md)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from student_trainer.config import TrainConfig
from student_trainer.kv_sources import SourceHealth
from student_trainer.kv_sources.kv_batch import STAGES
from student_trainer.monitoring.run_state import BOTTLENECKS, OWN_STAGES, PHASES, RunSnapshot, RunState, TeacherView

# The creation time of every counter would double the scraped series for no use.
disable_created_metrics()

PREFIX = "kvdistill_train_"
# Logged metrics with a Prometheus metric of their own: its name and help text.
FIGURES = {
    "train/lr": ("learning_rate", "The optimiser's learning rate."),
    "train/kv_weight": ("kv_weight", "The weight of the KV loss."),
    "train/epoch": ("epoch", "Passes over the training samples begun, from 0."),
    "train/samples_per_second": ("samples_per_second", "Samples of all ranks per second, over the last logged steps."),
    "kv/stall_fraction": ("stall_ratio", "Share of time that ranks waited for teachers, over the last logged steps."),
    "kv/bytes_per_sample": ("sample_bytes", "Encoded K/V of all teachers for one sample."),
    "routing/entropy": ("routing_entropy_nats", "Entropy of the weights: log(teachers) if equal, 0 for one teacher."),
    "val/ce_loss": ("validation_ce_loss", "The cross-entropy on validation samples, in nats per token."),
    "val/answer_ce": ("validation_answer_ce", "The cross-entropy of the answers of validation samples."),
    "val/loss": ("validation_loss", "The loss on validation samples, the weighted KV loss included."),
    "val/kv_loss": ("validation_kv_loss", "The normalised KV error on validation samples; 1 is predicting the mean."),
    "val/task_metrics/accuracy": ("validation_accuracy_ratio", "Share of validation samples answered exactly."),
}
LOSS_PREFIX = "train/"
# One value, or values by their labels; None where there is none.
Values = float | None | Mapping[tuple[str, ...], float | None]


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


def _gauge(name: str, text: str, values: Values, *labels: str) -> Metric:
    return _filled(GaugeMetricFamily(PREFIX + name, text, labels=labels), values)


def _counter(name: str, text: str, values: Values, *labels: str) -> Metric:
    return _filled(CounterMetricFamily(PREFIX + name, text, labels=labels), values)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Values) -> Metric:
    by_labels = values if isinstance(values, Mapping) else {(): values}
    for label_values, value in by_labels.items():
        if value is not None:
            family.add_metric(label_values, value)
    return family


def _one_hot(choices: tuple[str, ...], chosen: str | None) -> Values:
    return {(choice,): float(choice == chosen) for choice in choices}


def _progress(run: RunSnapshot) -> Iterator[Metric]:
    yield _gauge("phase", "1 for the current phase, 0 for the others.", _one_hot(PHASES, run.phase), "phase")
    yield _gauge("step", "Optimiser steps done, those before a resume included.", run.step)
    yield _gauge("planned_steps", "Optimiser steps of the whole run.", run.steps)
    yield _counter("samples_total", "Samples of all ranks trained on.", run.samples)
    yield _gauge("start_timestamp_seconds", "When this process began.", run.started_at)
    yield _gauge("last_step_timestamp_seconds", "When the last step ended.", run.last_step_at)
    yield _gauge("eta_seconds", "Seconds until the last step at the average pace.", run.eta_seconds)
    busy = {(stage,): run.busy_seconds[stage] for stage in OWN_STAGES}
    text = "Time of rank 0's training thread by stage, as of the last logged step."
    yield _counter("busy_seconds_total", text, busy, "stage")
    text = "1 for the longest stage of the last logged steps, 0 for the others."
    yield _gauge("bottleneck", text, _one_hot(BOTTLENECKS, run.bottleneck), "stage")


def _figures(run: RunSnapshot) -> Iterator[Metric]:
    losses = {
        (name.removeprefix(LOSS_PREFIX),): value
        for name, value in run.scalars.items()
        if name.startswith(LOSS_PREFIX) and name not in FIGURES
    }
    yield _gauge(
        "loss", "Training losses by part (docs/monitoring.md), mean over the last logged steps.", losses, "part"
    )
    for figure, (name, text) in FIGURES.items():
        yield _gauge(name, text, run.scalars.get(figure))


def _teachers(teachers: dict[str, TeacherView]) -> Iterator[Metric]:
    def each(value: Callable[[TeacherView], float | None]) -> Values:
        return {(name,): value(view) for name, view in teachers.items()}

    def health(value: Callable[[SourceHealth], float | None]) -> Values:
        return each(lambda teacher: None if teacher.health is None else value(teacher.health))

    for make, name, text, values in (
        (_gauge, "weight_ratio", "The teacher's mean share in the fusion.", each(lambda t: t.weight)),
        (_counter, "samples_total", "Samples with K/V, all ranks.", each(lambda t: t.sums.samples)),
        (_counter, "missing_samples_total", "Samples without K/V, all ranks.", each(lambda t: t.sums.missing)),
        (_counter, "received_bytes_total", "Encoded K/V, all ranks.", each(lambda t: t.sums.encoded_bytes)),
        (_gauge, "staleness_seconds", "Time since it last answered rank 0.", health(lambda h: h.answered_s_ago)),
        (_counter, "switches_total", "Switches of rank 0 to another replica.", health(lambda h: h.switches)),
        (_counter, "set_aside_total", "Replicas that refused or were another teacher.", health(lambda h: h.set_aside)),
        (_counter, "retries_total", "Requests that rank 0 repeated.", health(lambda h: h.retries)),
        (_counter, "hedges_total", "Second requests of rank 0, as the first was slow.", health(lambda h: h.hedges)),
    ):
        yield make(f"teacher_{name}", text, values, "teacher")
    stages = {(name, stage): view.sums.seconds[stage] for name, view in teachers.items() for stage in STAGES}
    text = (
        "Time by stage, summed over micro-batches and ranks: queue, prefill, encode and network, in which a batch of "
        "the teacher counts once; decode and stall (waiting)."
    )
    yield _counter("teacher_stage_seconds_total", text, stages, "teacher", "stage")
    endpoints = {
        (name, one.endpoint): float(one.problem is None)
        for name, view in teachers.items()
        for one in (view.health.endpoints if view.health else ())
    }
    text = "0 if the replica failed rank 0's last request, else 1. It gets no request while another replica answers."
    yield _gauge("teacher_endpoint_up", text, endpoints, "teacher", "endpoint")


def _disk(output_dir: Path) -> Iterator[Metric]:
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    usage = shutil.disk_usage(existing)
    yield _gauge("disk_free_bytes", "Free space where run.output_dir is.", usage.free)
    yield _gauge("disk_size_bytes", "Size of the disk where run.output_dir is.", usage.total)

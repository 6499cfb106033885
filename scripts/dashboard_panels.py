"""What the Grafana dashboard shows, row by row: `make_dashboard` lays it out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Query:
    """One expression, and how its series are called."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """What one panel shows. `text` says what to see in it; `stack`: `normal` or `percent`; `width`: of 24 columns."""

    title: str
    text: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    stack: str = "none"
    options: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def height(self) -> int:
        """In rows of the grid."""
        return 4 if self.kind in ("stat", "gauge") else 8


def run(metric: str, labels: str = "") -> str:
    """A metric of the run that the variable above the dashboard chooses."""
    return f'kvdistill_train_{metric}{{instance=~"$trainer"{"," if labels else ""}{labels}}}'


def server(metric: str) -> str:
    """A metric of the chosen servers."""
    return f'kvdistill_{metric}{{instance=~"$server"}}'


def rate(series: str) -> str:
    """By the second, over the shortest time that is certain to hold scrapes."""
    return f"rate({series}[$__rate_interval])"


def quantile(share: float, histogram: str) -> str:
    """Of a server's histogram, by server."""
    return f"histogram_quantile({share}, sum by (le, instance) ({rate(server(f'{histogram}_bucket'))}))"


def stat(title: str, text: str, query: Query, unit: str = "short", *, name: bool = False, width: int = 4) -> Panel:
    """One number, or (`name`) the name of the series that is there."""
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"]},
        "colorMode": "none",
        "graphMode": "none",
        "textMode": "name" if name else "auto",
    }
    return Panel(title, text, (query,), unit, "stat", width, options=options)


def run_row() -> tuple[Panel, ...]:
    """Where the run is."""
    progress = f"{run('step')} / {run('planned_steps')}"
    share = {"min": 0, "max": 1}
    return (
        stat("Phase", "What the run is doing.", Query(f"{run('phase')} == 1", "{{phase}}"), name=True),
        Panel(
            "Progress",
            "Steps done, of all.",
            (Query(progress),),
            "percentunit",
            "gauge",
            4,
            options={"reduceOptions": {"calcs": ["lastNotNull"]}},
            defaults=share,
        ),
        stat("Time left", "At the pace so far.", Query(run("eta_seconds")), "s"),
        stat("Samples per second", "All ranks.", Query(run("samples_per_second")), "short"),
        stat(
            "Bottleneck",
            "The stage that most of the last logged steps' time went to. Speed up this one; any other is no use.",
            Query(f"{run('bottleneck')} == 1", "{{stage}}"),
            name=True,
        ),
        stat("Waiting for teachers", "Share of the ranks' time.", Query(run("stall_ratio")), "percentunit"),
    )


def learning_row() -> tuple[Panel, ...]:
    """Whether it learns."""
    weight = Query(run("teacher_weight_ratio"), "{{teacher}}")
    return (
        Panel("Losses", "By part; docs/monitoring.md says what each is.", (Query(run("loss"), "{{part}}"),)),
        Panel(
            "KV loss",
            "Normalised: 1 is predicting the mean, below 0.5 is good, above 1.5 means: check the alignment.",
            (
                Query(run("loss", 'part="kv_loss"'), "training"),
                Query(run("validation_kv_loss"), "validation"),
            ),
            defaults={"min": 0},
        ),
        Panel(
            "Validation",
            "Share of samples answered exactly; the best model is the one with the highest.",
            (Query(run("validation_accuracy_ratio"), "accuracy"),),
            "percentunit",
            defaults={"min": 0, "max": 1},
        ),
        Panel(
            "Routing weights",
            "Each teacher's mean share in the fusion. One that takes all leaves the others without use.",
            (weight,),
            "percentunit",
            stack="normal",
            defaults={"max": 1},
        ),
        Panel(
            "Routing entropy",
            "How evenly weights are spread, in nats: log of the teachers' number if equal, 0 for one alone.",
            (Query(run("routing_entropy_nats"), "entropy"),),
            defaults={"min": 0},
        ),
        Panel("Learning rate", "Warm-up, then the schedule.", (Query(run("learning_rate"), "learning rate"),)),
    )


def time_row() -> tuple[Panel, ...]:
    """Where the time goes."""
    stages = f"{rate(run('teacher_stage_seconds_total'))} / on (instance, teacher) group_left " + rate(
        run("teacher_samples_total")
    )
    return (
        Panel(
            "Rank 0's time",
            "train: forward, backward, optimiser; stall: waiting for teachers.",
            (Query(rate(run("busy_seconds_total")), "{{stage}}"),),
            "percentunit",
            stack="percent",
        ),
        Panel(
            "A sample's time by stage",
            "Seconds for each sample, by teacher. With prefetch they overlap with training; only stall holds it up.",
            (Query(stages, "{{teacher}} {{stage}}"),),
            "s",
            width=16,
        ),
        Panel(
            "K/V received",
            "Encoded bytes, all ranks.",
            (Query(rate(run("teacher_received_bytes_total")), "{{teacher}}"),),
            "Bps",
        ),
        Panel(
            "Since a teacher's last answer",
            "It grows while prefetch is full; together with a stall it means a teacher that hangs.",
            (Query(run("teacher_staleness_seconds"), "{{teacher}}"),),
            "s",
        ),
        Panel(
            "Retries, switches, missing samples",
            "In five minutes: requests asked again, changes to another replica, samples without K/V.",
            tuple(
                Query(f"increase({run(f'teacher_{name}_total')}[5m])", f"{{{{teacher}}}} {label}")
                for name, label in (("retries", "retries"), ("switches", "switches"), ("missing_samples", "missing"))
            ),
        ),
    )


def teachers_row() -> tuple[Panel, ...]:
    """How the servers do."""
    by_code = f"sum by (instance, method, code) ({rate(server('requests_total'))})"
    filled = "{{instance}}"
    return (
        Panel("Ready", "1 while requests are taken.", (Query(server("ready"), filled),), defaults={"min": 0, "max": 1}),
        Panel("Calls", "By their status.", (Query(by_code, "{{instance}} {{method}} {{code}}"),), "reqps"),
        Panel(
            "Samples",
            "By their own status: one that fails leaves the rest of its request to go on.",
            (Query(f"sum by (instance, status) ({rate(server('samples_total'))})", "{{instance}} {{status}}"),),
        ),
        Panel(
            "Wait in the queue",
            "Median and slowest tenth. High: the teacher has more to do than it can; add a replica.",
            (
                Query(quantile(0.5, "queue_wait_seconds"), "{{instance}} median"),
                Query(quantile(0.9, "queue_wait_seconds"), "{{instance}} p90"),
            ),
            "s",
        ),
        Panel(
            "First frame",
            "From a call's start, slowest tenth: waiting and the first layer.",
            (Query(quantile(0.9, "first_frame_seconds"), filled),),
            "s",
        ),
        Panel(
            "Duration of calls",
            "Slowest tenth.",
            (Query(quantile(0.9, "request_seconds"), filled),),
            "s",
        ),
        Panel(
            "Queue",
            "Tokens that wait or run, of the limit at which requests are refused.",
            (Query(f"{server('queued_tokens')} / {server('queued_tokens_limit')}", filled),),
            "percentunit",
            defaults={"min": 0},
        ),
        Panel(
            "Tokens through the model",
            "Padding not counted.",
            (
                Query(rate(server("tokens_total")), "{{instance}} read"),
                Query(rate(server("written_tokens_total")), "{{instance}} written"),
            ),
        ),
        Panel(
            "Samples in a batch",
            "Mean. Low with a long queue: max_batch_tokens is small, or texts are long.",
            (
                Query(
                    f"{rate(server('batch_samples_sum'))} / {rate(server('batch_samples_count'))}",
                    filled,
                ),
            ),
        ),
        Panel(
            "The engine's time",
            "prefill: the model; encode: selecting, encoding, copying; write: Generate. Together below 1: it idles.",
            (
                Query(rate(server("prefill_seconds_total")), "{{instance}} prefill"),
                Query(rate(server("encode_seconds_total")), "{{instance}} encode"),
                Query(rate(server("writing_seconds_total")), "{{instance}} write"),
            ),
            "percentunit",
            stack="normal",
        ),
        Panel(
            "K/V sent",
            "Bytes of frames of calls that ended, by codec.",
            (Query(rate(server("sent_bytes_total")), "{{instance}} {{codec}}"),),
            "Bps",
        ),
        Panel(
            "Open calls and engine errors",
            "Errors are batches that the engine failed on, in five minutes.",
            (
                Query(server("open_streams"), "{{instance}} open"),
                Query(f"increase({server('engine_errors_total')}[5m])", "{{instance}} errors"),
            ),
        ),
    )


def machines_row() -> tuple[Panel, ...]:
    """What the processes take."""
    both = '{instance=~"$trainer|$server"}'
    return (
        Panel(
            "Memory",
            "Resident; of the trainer rank 0 alone.",
            (Query(f"process_resident_memory_bytes{both}", "{{job}} {{instance}}"),),
            "bytes",
        ),
        Panel(
            "CPU", "Cores in use.", (Query(rate(f"process_cpu_seconds_total{both}"), "{{job}} {{instance}}"),), "short"
        ),
        Panel(
            "Free disk",
            "Where run.output_dir is.",
            (Query(run("disk_free_bytes"), "{{instance}}"),),
            "bytes",
            defaults={"min": 0},
        ),
    )


ROWS = {
    "Run": run_row(),
    "Learning": learning_row(),
    "Where the time goes": time_row(),
    "Teacher servers": teachers_row(),
    "Processes": machines_row(),
}

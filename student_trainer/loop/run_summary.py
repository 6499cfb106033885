"""The content of `summary.json`: the totals of a run, over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvcore.monitoring.process_memory import peak_memory_mib
from student_trainer.kv_sources.kv_batch import TeacherSums
from student_trainer.loop.metric_accumulator import MetricAccumulator


def run_summary(
    steps: int,
    best: Mapping[str, float],
    totals: MetricAccumulator,
    teachers: int,
    place: tuple[int, int],
    sum_over_ranks: Callable[[Sequence[float]], list[float]],
) -> dict[str, Any]:
    """All ranks must call it.

    Args:
        steps: optimiser steps of the run.
        best: the metrics of the best validation and its `step`; empty without validation.
        totals: of this rank, since this process started.
        teachers: number of teachers.
        place: rank and world size.
        sum_over_ranks: adds rows of numbers up.
    """
    rank, world_size = place
    peaks = sum_over_ranks([peak_memory_mib() * (index == rank) for index in range(world_size)])
    kv = TeacherSums.from_row(sum_over_ranks(totals.kv_sums().row()))
    seconds, received = max(totals.seconds, 1e-9), max(kv.samples, 1.0)
    return {
        "steps": steps,
        "best_step": int(best.get("step", steps)),
        "val_task_metrics": {"accuracy": best["val/task_metrics/accuracy"]} if best else {},
        **{f"val_{name}": best.get(f"val/{name}") for name in ("ce_loss", "perplexity", "kv_loss")},
        "stall_fraction": kv.seconds["stall"] / world_size / seconds,
        "samples_per_second": totals.samples / seconds,
        "bytes_per_sample": kv.encoded_bytes / received * teachers,
        "raw_bf16_bytes_per_sample": kv.raw_bytes / received * teachers,
        "teacher_tokens_per_second": kv.tokens / seconds,
        "peak_memory_mb": {f"rank{index}": peak for index, peak in enumerate(peaks)},
    }

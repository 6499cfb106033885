"""The charts of a run's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvcore.monitoring.charts import Chart
from student_trainer.monitoring.run_state import RunSnapshot

_WEIGHT = "routing/weights_mean/"
KV_LEVELS = ((0.5, "below: good"), (1.0, "predicts the mean"), (1.5, "above: check the alignment"))
# Label and metric of each curve.
_CROSS_ENTROPY = {"train": "train/ce_loss", "validation": "val/ce_loss"}
_ANSWER = "val/answer_ce"
_TOTAL = {"train": "train/loss", "validation": "val/loss"}
_KV = {"train": "train/kv_loss", "validation": "val/kv_loss"}
_MEMORY = {"host": "memory/host_mib", "GPU, peak": "memory/gpu_peak_mib"}


def run_charts(run: RunSnapshot, teachers: Sequence[str]) -> list[Chart]:
    """The charts in the order of the page.

    Args:
        run: whose history they show.
        teachers: their names, in the order of their colours.
    """

    def found(curves: Mapping[str, str]) -> dict[str, list[tuple[int, float]]]:
        # A curve keeps its colour while others have no value yet.
        return {label: run.history.get(name, []) for label, name in curves.items()}

    cross_entropy = dict(_CROSS_ENTROPY)
    if run.history.get(_ANSWER) != run.history.get("val/ce_loss"):  # In latent mode they are equal.
        cross_entropy["validation, answer"] = _ANSWER
    weights = found({name: f"{_WEIGHT}{name}" for name in teachers})
    return [
        Chart("Cross-entropy", found(cross_entropy)),
        Chart("KV loss", found(_KV), lines=KV_LEVELS),
        Chart("Validation accuracy", found({"accuracy": "val/task_metrics/accuracy"}), "%", top=1.0),
        Chart("Routing weights", weights, "%", top=1.0),
        Chart("Total loss, with the weighted KV loss", found(_TOTAL)),
        Chart("Time waiting for teachers", found({"stall": "kv/stall_fraction"}), "%"),
        Chart("Learning rate", found({"learning rate": "train/lr"})),
        Chart("Samples per second", found({"all ranks": "train/samples_per_second"})),
        Chart("Memory of rank 0", found(_MEMORY), "MiB"),
    ]

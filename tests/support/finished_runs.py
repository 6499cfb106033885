"""Output directories of finished training runs, with synthetic metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TEACHERS = ("ada", "ben")
STEPS = (10, 20, 30)


def validation(accuracy: float, by_dataset: Mapping[str, float], layers: int) -> dict[str, float]:
    """The metrics of one validation. `by_dataset` gives the weight of ada per dataset; ben has the rest."""
    found = {"val/loss": 2 - accuracy, "val/kv_loss": 1 - accuracy, "val/task_metrics/accuracy": accuracy}
    found |= {"val/ce_loss": 1.5 - accuracy, "val/perplexity": math.exp(1.5 - accuracy)}
    for tensor, base in (("k", 0.2), ("v", 0.4)):
        found |= {f"val/kv_loss/{tensor}/layer{layer}": base + layer / 100 for layer in range(layers)}
    for dataset, weight in by_dataset.items():
        below = f"val/by_dataset/{dataset}"
        found[f"{below}/accuracy"] = accuracy
        for teacher, share in zip(TEACHERS, (weight, 1 - weight), strict=True):
            found[f"{below}/routing/weights_mean/{teacher}"] = share
    return found


def write_run(
    folder: Path,
    accuracies: Sequence[float] = (0.2, 0.6, 0.5),
    *,
    by_dataset: Mapping[str, float] | None = None,
    layers: int = 3,
    ended: bool = True,
    scores: Mapping[str, Mapping[str, Any]] | None = None,
    exist_ok: bool = False,
) -> Path:
    """Write a run with three validations, the best one by accuracy. `scores` are additional entries of its results."""
    folder.mkdir(parents=True, exist_ok=exist_ok)
    lines: list[dict[str, float]] = []
    for step, accuracy in zip(STEPS, accuracies, strict=True):
        weights = {f"routing/weights_mean/{teacher}": 0.5 for teacher in TEACHERS}
        losses = {"train/loss": 2 - accuracy, "train/ce_loss": 1.25 - accuracy, "train/kv_loss": 1 - accuracy}
        lines.append({"step": step, **losses, **weights})
        lines.append({"step": step, **validation(accuracy, by_dataset or {}, layers)})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    best = max(accuracies)
    entry = {"dataset": "val", "metric": "accuracy", "score": 100 * best, "num_examples": 10}
    (folder / "eval_results.json").write_text(
        json.dumps({"val": entry, **(scores or {}), "average": 100 * best}), encoding="utf-8"
    )
    if ended:
        summary = {
            "best_step": STEPS[accuracies.index(best)],
            "samples_per_second": 12.5,
            "stall_fraction": 0.034,
            "bytes_per_sample": 23456.0,
            "seconds": 99.0,
        }
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder

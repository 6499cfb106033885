"""TensorBoard's curves of a run: every metric, and the names under which the guide lists some of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

DIRECTORY = "tensorboard"
_ACCURACY, _WEIGHTS = "val/task_metrics/accuracy", "routing/weights_mean/"


class Board:
    """Writes the curves of one process of a run.

    `val/task_metrics` is the accuracy. `routing/weights_mean` is one chart with a curve for each teacher, which
    TensorBoard shows as a run of that name.
    """

    def __init__(self, output_dir: Path, first_step: int) -> None:
        self._directory, self._purge_step = output_dir / DIRECTORY, first_step + 1
        self._writers: dict[str, SummaryWriter] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one point to the curve of each metric."""
        for name, value in metrics.items():
            self._writer("").add_scalar(name, value, step)
            if name == _ACCURACY:
                self._writer("").add_scalar(_ACCURACY.rpartition("/")[0], value, step)
            elif name.startswith(_WEIGHTS):
                self._writer(name.removeprefix(_WEIGHTS)).add_scalar(_WEIGHTS.rstrip("/"), value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        for writer in self._writers.values():
            writer.close()

    def _writer(self, teacher: str) -> SummaryWriter:
        if teacher not in self._writers:
            self._writers[teacher] = SummaryWriter(str(self._directory / teacher), purge_step=self._purge_step)
        return self._writers[teacher]


def add_scores(output_dir: Path, scores: Mapping[str, float]) -> None:
    """Adds benchmark scores as `eval/<dataset>` at the step of the best model, if the directory holds a run."""
    summary = output_dir / "summary.json"
    if not ((output_dir / DIRECTORY).is_dir() and summary.is_file()):
        return
    step = json.loads(summary.read_text(encoding="utf-8"))["best_step"]
    with SummaryWriter(str(output_dir / DIRECTORY)) as writer:
        for dataset, score in scores.items():
            writer.add_scalar(f"eval/{dataset}", score, step)

"""Writes metrics to TensorBoard, JSON Lines, experiment trackers, and a progress line."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvcore.files import json_text, replace_file
from kvcore.monitoring.units import in_time, number
from student_trainer.monitoring.run_state import RunState
from student_trainer.monitoring.trackers import ExperimentTracker, close_trackers, log_to

logger = logging.getLogger(__name__)


class Tracker:
    """Writes the metrics of rank 0 and keeps them in `state`. Does nothing on other ranks.

    `trackers`: experiment trackers by name, which get the same metrics. They are closed with this one.
    """

    def __init__(
        self,
        output_dir: Path,
        steps: int,
        *,
        enabled: bool,
        first_step: int,
        state: RunState | None = None,
        trackers: Mapping[str, ExperimentTracker] | None = None,
    ) -> None:
        self._trackers = trackers or {}
        self._enabled = enabled
        self._steps = steps
        self.state = RunState() if state is None else state
        self.state.begin(steps, first_step)
        if not enabled:
            return
        from student_trainer.monitoring.tensorboard import Board  # noqa: PLC0415 - slow to import

        output_dir.mkdir(parents=True, exist_ok=True)
        self._board = Board(output_dir, first_step)
        self._lines_path = output_dir / "metrics.jsonl"
        for line in _drop_lines_after(self._lines_path, first_step):
            self.state.log(line.pop("step"), line, earlier_process=True)
        self._lines = self._lines_path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Records metrics under the names of docs/monitoring.md. Those that are not finite are left out."""
        if not self._enabled:
            return
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._board.log(step, metrics)
        self._lines.write(json_text({"step": step} | metrics) + "\n")
        self._lines.flush()
        self.state.log(step, metrics)
        log_to(self._trackers, step, metrics)

    def progress(self, step: int, metrics: dict[str, float]) -> None:
        """Logs one line: step, losses, stall, time left, and teachers with a failed replica."""
        if not self._enabled or self.state.on_terminal:
            return
        line = [f"step {step}/{self._steps}"]
        # The total comes last: with a large weight it is mostly the KV loss.
        losses = [name for name in ("ce_loss", "kv_loss", "loss") if f"train/{name}" in metrics]
        line += [f"{name} {metrics[f'train/{name}']:.4f}" for name in losses]
        if "train/kv_weight" in metrics:
            line.append(f"kv_weight {number(metrics['train/kv_weight'])}")
        if "kv/stall_fraction" in metrics:
            line.append(f"stall {metrics['kv/stall_fraction']:.0%}")
        line.append(f"{number(metrics['train/samples_per_second'])} samples/s")
        line.append(f"ETA {in_time(self.state.eta_seconds or 0.0)}")
        line += self.state.down()
        logger.info("  ".join(line))

    def close(self) -> None:
        """Flushes and closes the files and trackers, in a `finally` block."""
        if self._enabled:
            close_trackers(self._trackers, failed=sys.exc_info()[0] is not None)
            self._board.close()
            self._lines.close()


def _drop_lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Removes the lines after `step`, which a resumed run logs again, and returns the others."""
    if not path.is_file():
        return []
    # An incomplete last line was being written when the process ended, after the checkpoint.
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    kept = [(line, parsed) for line in lines if (parsed := json.loads(line))["step"] <= step]
    replace_file(path, "".join(line for line, _ in kept))
    return [parsed for _, parsed in kept]

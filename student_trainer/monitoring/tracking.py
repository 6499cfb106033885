"""Writes metrics to TensorBoard, JSON Lines, and a progress line."""

from __future__ import annotations

import json
import logging
import math
import resource
from pathlib import Path
from typing import Any

from kvcore.files import json_text, replace_file
from kvcore.monitoring.units import in_time
from student_trainer.monitoring.run_state import RunState

logger = logging.getLogger(__name__)


class Tracker:
    """Writes the metrics of rank 0 and keeps them in `state`. Does nothing on other ranks."""

    def __init__(
        self, output_dir: Path, steps: int, *, enabled: bool, first_step: int, state: RunState | None = None
    ) -> None:
        self._enabled = enabled
        self._steps = steps
        self.state = RunState() if state is None else state
        self.state.begin(steps, first_step)
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - slow to import

        output_dir.mkdir(parents=True, exist_ok=True)
        self._board = SummaryWriter(str(output_dir / "tensorboard"), purge_step=first_step + 1)
        self._lines_path = output_dir / "metrics.jsonl"
        for line in _drop_lines_after(self._lines_path, first_step):
            self.state.log(line.pop("step"), line, earlier_process=True)
        self._lines = self._lines_path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Records metrics under the names of docs/monitoring.md. Those that are not finite are left out."""
        if not self._enabled:
            return
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        self._lines.write(json_text({"step": step} | metrics) + "\n")
        self._lines.flush()
        self.state.log(step, metrics)

    def progress(self, step: int, metrics: dict[str, float]) -> None:
        """Logs one line: step, losses, stall, time left, and teachers with a failed replica."""
        if not self._enabled or self.state.on_terminal:
            return
        line = [f"step {step}/{self._steps}"]
        for name, label in (("train/loss", "loss"), ("train/ce_loss", "ce"), ("train/kv_loss", "kv")):
            if name in metrics:
                line.append(f"{label} {metrics[name]:.4f}")
        if "kv/stall_fraction" in metrics:
            line.append(f"stall {metrics['kv/stall_fraction']:.0%}")
        line.append(f"{metrics['train/samples_per_second']:.0f} samples/s")
        line.append(f"ETA {in_time(self.state.eta_seconds or 0.0)}")
        line += self.state.down()
        logger.info("  ".join(line))

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._enabled:
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


def peak_memory_mb() -> float:
    """This process's peak resident memory, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

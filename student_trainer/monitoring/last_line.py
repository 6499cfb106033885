"""The last log line of a run: the model's scores, its folder, and the next command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from student_trainer.config import BEST_MODEL, TrainConfig


def last_line(config: TrainConfig, summary: Mapping[str, Any]) -> str:
    """The line for a run that ended with `summary`; of several stages the last one."""
    settings = config.stage(len(config.stages) - 1) if config.stages else config
    model = shlex.quote(str(settings.run.output_dir / BEST_MODEL))
    return f'done: {best_validation(summary)}; model: {model}; next: kvdistill generate {model} "QUESTION"'


def best_validation(summary: Mapping[str, Any]) -> str:
    """The scores of the best validation, and its step."""
    if not summary["val_task_metrics"]:
        return f"{summary['steps']:,} steps without validation"
    scores = f"accuracy {summary['val_task_metrics']['accuracy']:.1%}, cross-entropy {summary['val_ce_loss']:.4f}"
    return f"best validation: {scores} at step {summary['best_step']:,} of {summary['steps']:,}"

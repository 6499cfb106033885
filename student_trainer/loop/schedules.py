"""Settings that change over a run, as functions of the step."""

from __future__ import annotations

import math

from student_trainer.config import LossConfig, OptimConfig


def learning_rate(optim: OptimConfig, step: int, steps: int, first: int = 0) -> float:
    """The learning rate after `step` of `steps` steps: linear warm-up, then the schedule down to 0.

    `first`: the step before which AdamW started without moments, at the end of `align.warmup_steps`. The rate rises
    again from there, because the first updates without moments are large.
    """
    warmup = round(optim.warmup_ratio * steps)
    rise = min(1.0, (step - first + 1) / warmup) if warmup else 1.0
    if optim.schedule == "constant":
        return optim.lr * rise
    done = max(0.0, (step - warmup) / max(1, steps - warmup))
    return optim.lr * rise * (1 - done if optim.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


def kv_weight_share(loss: LossConfig, step: int, steps: int, first: int = 0) -> float:
    """The share of `loss.kv_weight` in the step after `step` of `steps` steps; the KV loss begins at `first`."""
    return 1.0 if loss.kv_decay == "none" else 1.0 - (step - first) / (steps - first)

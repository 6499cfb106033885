"""Metrics of the teachers at a logged step: KV weight, replicas, routing."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch.distributed as dist

from fuse.routing import CollapseDetector
from student_trainer.loop.training_context import TrainingContext

logger = logging.getLogger(__name__)

_WEIGHTS = "routing/weights_mean/"


def teacher_figures(context: TrainingContext) -> dict[str, float]:
    """The weight of the KV loss, each teacher's switches and retries, and what routing does not measure by sample."""
    model = context.model
    figures = {"train/kv_weight": model.kv_weight}
    for name, source in context.sources.items():
        health = source.health()
        figures[f"kv/switches/{name}"] = health.switches if health else 0
        figures[f"kv/retries/{name}"] = health.retries if health else 0
    if context.config.fuse.kind == "fixed":
        return figures | {f"{_WEIGHTS}{name}": weight for name, weight in model.weights.items()}
    assert model.fusion is not None
    return figures | {"routing/temperature": model.fusion.temperature}


def warn_of_collapse(
    detector: CollapseDetector, context: TrainingContext, figures: Mapping[str, float], step: int
) -> None:
    """Warns if the router uses almost only one teacher."""
    if context.config.fuse.kind == "fixed":
        return
    warning = detector.check([figures[f"{_WEIGHTS}{name}"] for name in context.model.weights])
    if warning and dist.get_rank() == 0:
        logger.warning("step %d: %s", step, warning)

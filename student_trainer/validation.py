"""Validation: the losses, the answers that the student writes, and where its K/V still err."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from align.head_dim_adapter import TENSORS
from data.records import Record
from kvcore.types import Tensor
from student_trainer.build import Parts
from student_trainer.evaluate import answer, is_correct, mean_over_ranks, rank_batches
from student_trainer.model import TrainBatch

Fetch = Callable[[Sequence[Record]], TrainBatch]


@dataclass(frozen=True, slots=True)
class Validation:
    """`metrics` by their names in docs/metrics.md; `kv_error_KLH`: normalised error by tensor, layer and head."""

    metrics: dict[str, float]
    kv_error_KLH: Tensor | None

    def results(self, parts: Parts, step: int) -> dict[str, Any]:
        """What `eval_results.json` holds: one entry per dataset, scores in percent, and their average."""
        score = 100 * self.metrics["val/task_metrics/accuracy"]
        entry: dict[str, Any] = {
            "dataset": parts.config.data.val.stem if parts.config.data.val else "val",
            "metric": "accuracy",
            "score": score,
            "num_examples": len(parts.val),
            "step": step,
            "loss": self.metrics["val/loss"],
        }
        if "val/kv_loss" in self.metrics:
            entry["kv_loss"] = self.metrics["val/kv_loss"]
        if self.kv_error_KLH is not None:
            entry["kv_error"] = dict(zip(TENSORS, self.kv_error_KLH.tolist(), strict=True))
        routing = "routing/weights_mean/"
        weights = {name.removeprefix(routing): w for name, w in self.metrics.items() if name.startswith(routing)}
        if weights:
            entry["routing_weights_mean"] = weights
        return {entry["dataset"]: entry, "average": score}


@torch.no_grad()
def validate(module: nn.Module, parts: Parts, fetch: Fetch, device: torch.device) -> Validation:
    """Runs over the validation records; ranks share them. All ranks must call it.

    Args:
        module: the model as its engine holds it, in evaluation mode.
        parts: the run.
        fetch: gets a micro-batch with the teachers' K/V.
        device: this rank's.
    """
    config, records = parts.config, parts.val
    latent = config.student.mode == "latent"
    totals: dict[str, float] = {"count": 0.0, "accuracy": 0.0, "loss": 0.0, "kv_loss": 0.0}
    errors: Tensor | None = None
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for indices, counted in rank_batches(len(records), config.run.micro_batch, rank, world_size):
        chosen = [records[index] for index in indices]
        # What fills a batch up enters no mean; every rank runs its pass all the same.
        losses = module(fetch(chosen).first(max(1, counted)))
        written = answer(
            parts.model.student,
            parts.collator,
            parts.tokenizer,
            chosen,
            config.data.answer_tokens,
            device,
            latent=latent,
        )
        totals["count"] += counted
        totals["accuracy"] += sum(
            is_correct(text, record, latent=latent)
            for text, record in zip(written[:counted], chosen[:counted], strict=True)
        )
        for name, value in losses.items():
            if name in ("loss", "kv_loss") or name.startswith("routing/"):
                totals[name] = totals.get(name, 0.0) + float(value) * counted
        if "kv_error_KLH" in losses:
            errors = losses["kv_error_KLH"] * counted + (0.0 if errors is None else errors)
    count = totals["count"]
    means = mean_over_ranks(totals, device)
    metrics = {"val/loss": means["loss"], "val/task_metrics/accuracy": means["accuracy"]}
    metrics |= {name: value for name, value in means.items() if name.startswith("routing/")}
    if not parts.teachers:
        return Validation(metrics, None)
    metrics["val/kv_loss"] = means["kv_loss"]
    if errors is not None:
        errors = _mean_error(errors, count, device)
        for tensor, by_layer_LH in zip(TENSORS, errors, strict=True):
            layers = by_layer_LH.mean(dim=1).tolist()
            metrics |= {f"val/kv_loss/{tensor}/layer{layer}": value for layer, value in enumerate(layers)}
    return Validation(metrics, errors)


def _mean_error(errors_KLH: Tensor, count: float, device: torch.device) -> Tensor:
    total = torch.tensor(count, dtype=torch.float64, device=device)
    errors_KLH = errors_KLH.double()
    for tensor in (errors_KLH, total):
        dist.all_reduce(tensor)
    return errors_KLH / total.clamp(min=1.0)

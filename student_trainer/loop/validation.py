"""Validation: the losses, the answers that the student writes, and where its K/V still err."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from data.records import Record
from kvcore.types import TENSORS, Tensor
from student_trainer.loop.greedy_answers import answer, is_correct, mean_over_ranks, rank_batches
from student_trainer.loop.training_context import TrainingContext
from student_trainer.model.distill_model import TrainBatch
from student_trainer.monitoring.phase_progress import watched

Fetch = Callable[[Sequence[Record]], TrainBatch]
BY_DATASET = "val/by_dataset/"
_WEIGHTS = "routing/weights_mean/"


@dataclass(frozen=True, slots=True)
class Validation:
    """`metrics` by their names in docs/metrics.md; `kv_error_KLH`: normalised error by tensor, layer and head."""

    metrics: dict[str, float]
    kv_error_KLH: Tensor | None

    def results(self, parts: TrainingContext, step: int) -> dict[str, Any]:
        """What `eval_results.json` holds: one entry per dataset, scores in percent, and their average."""
        score = 100 * self.metrics["val/task_metrics/accuracy"]
        entry: dict[str, Any] = {
            "dataset": parts.config.data.val.stem if parts.config.data.val else "val",
            "metric": "accuracy",
            "score": score,
            "num_examples": len(parts.val),
            "split": "validation",
            "step": step,
            "loss": self.metrics["val/loss"],
        }
        if "val/kv_loss" in self.metrics:
            entry["kv_loss"] = self.metrics["val/kv_loss"]
        if self.kv_error_KLH is not None:
            entry["kv_error"] = dict(zip(TENSORS, self.kv_error_KLH.tolist(), strict=True))
        weights = self._below(_WEIGHTS)
        if weights:
            entry["routing_weights_mean"] = weights
        by_dataset = self._by_dataset(parts.val)
        if by_dataset:
            entry["by_dataset"] = by_dataset
        return {entry["dataset"]: entry, "average": score}

    def _below(self, prefix: str) -> dict[str, float]:
        """The metrics whose names begin so, without that beginning."""
        return {name.removeprefix(prefix): value for name, value in self.metrics.items() if name.startswith(prefix)}

    def _by_dataset(self, records: Sequence[Record]) -> dict[str, dict[str, Any]]:
        """Each named dataset's share of the figures."""
        found: dict[str, dict[str, Any]] = {}
        for dataset, count in Counter(record.dataset for record in records if record.dataset).items():
            prefix = f"{BY_DATASET}{dataset}/"
            accuracy = self.metrics[f"{prefix}accuracy"]
            one: dict[str, Any] = {
                "score": 100 * accuracy,
                "num_examples": count,
                "loss": self.metrics[f"{prefix}loss"],
            }
            if f"{prefix}kv_loss" in self.metrics:
                one["kv_loss"] = self.metrics[f"{prefix}kv_loss"]
            weights = self._below(f"{prefix}{_WEIGHTS}")
            found[dataset] = one | ({"routing_weights_mean": weights} if weights else {})
        return found


@torch.no_grad()
def validate(module: nn.Module, parts: TrainingContext, fetch: Fetch, device: torch.device) -> Validation:
    """Runs over the validation records; ranks share them. All ranks must call it.

    Args:
        module: the model as its engine holds it, in evaluation mode.
        parts: the run.
        fetch: gets a micro-batch with the teachers' K/V.
        device: this rank's.
    """
    latent = parts.config.student.mode == "latent"
    sums: dict[str, dict[str, float]] = {}
    errors: Tensor | None = None
    batches = list(_batches(parts.val, parts.config.run.micro_batch))
    for dataset, chosen, counted in watched("validating", batches):
        # What fills a batch up enters no mean; every rank runs its pass all the same.
        losses = module(fetch(chosen).first(max(1, counted)))
        written = answer(
            parts.model.student,
            parts.collator,
            parts.tokenizer,
            chosen,
            parts.config.data.answer_tokens,
            device,
            latent=latent,
        )
        right = [is_correct(text, record, latent=latent) for text, record in zip(written, chosen, strict=True)]
        found = {"count": float(counted), "accuracy": float(sum(right[:counted]))}
        for name, value in losses.items():
            if name in ("loss", "kv_loss") or name.startswith("routing/"):
                found[name] = float(value) * counted
        _add(sums.setdefault(dataset, {}), found)
        if "kv_error_KLH" in losses:
            errors = losses["kv_error_KLH"] * counted + (0.0 if errors is None else errors)
    totals: dict[str, float] = {}
    for one in sums.values():
        _add(totals, one)
    means = mean_over_ranks(totals, device)
    metrics = {"val/loss": means["loss"], "val/task_metrics/accuracy": means["accuracy"]}
    metrics |= {name: value for name, value in means.items() if name.startswith("routing/")}
    metrics |= _by_dataset(sums, device)
    if not parts.teachers:
        return Validation(metrics, None)
    metrics["val/kv_loss"] = means["kv_loss"]
    if errors is not None:
        errors = _mean_error(errors, totals["count"], device)
        for tensor, by_layer_LH in zip(TENSORS, errors, strict=True):
            layers = by_layer_LH.mean(dim=1).tolist()
            metrics |= {f"val/kv_loss/{tensor}/layer{layer}": value for layer, value in enumerate(layers)}
    return Validation(metrics, errors)


def _batches(records: Sequence[Record], micro_batch: int) -> Iterator[tuple[str, list[Record], int]]:
    """This rank's batches, and how many records of each count; a batch is of one dataset, so its means are too."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for dataset in dict.fromkeys(record.dataset for record in records):
        group = [record for record in records if record.dataset == dataset]
        for indices, counted in rank_batches(len(group), micro_batch, rank, world_size):
            yield dataset, [group[index] for index in indices], counted


def _by_dataset(sums: Mapping[str, dict[str, float]], device: torch.device) -> dict[str, float]:
    """The named datasets' metrics. All ranks have the same datasets in the same order."""
    metrics: dict[str, float] = {}
    for dataset, one in sums.items():
        means = mean_over_ranks(one, device) if dataset else {}
        kept = [name for name in means if name in ("accuracy", "loss", "kv_loss") or name.startswith(_WEIGHTS)]
        metrics |= {f"{BY_DATASET}{dataset}/{name}": means[name] for name in kept}
    return metrics


def _add(totals: dict[str, float], found: dict[str, float]) -> None:
    for name, value in found.items():
        totals[name] = totals.get(name, 0.0) + value


def _mean_error(errors_KLH: Tensor, count: float, device: torch.device) -> Tensor:
    total = torch.tensor(count, dtype=torch.float64, device=device)
    errors_KLH = errors_KLH.double()
    for tensor in (errors_KLH, total):
        dist.all_reduce(tensor)
    return errors_KLH / total.clamp(min=1.0)

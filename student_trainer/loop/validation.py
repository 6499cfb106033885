"""Validation: losses, accuracy of the student's answers, and the error of its K/V by layer and head."""

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
from student_trainer.monitoring.phase_progress import show_progress

Fetch = Callable[[Sequence[Record]], TrainBatch]
BY_DATASET = "val/by_dataset/"
_WEIGHTS = "routing/weights_mean/"
# The entries of the flattened kv_error_KLH, among the sums.
_ERROR = "kv_error/"


@dataclass(frozen=True, slots=True)
class Validation:
    """`metrics`: by their names in docs/monitoring.md. `kv_error_KLH`: normalised error by tensor, layer and head."""

    metrics: dict[str, float]
    kv_error_KLH: Tensor | None

    def results(self, context: TrainingContext, step: int) -> dict[str, Any]:
        """The content of `eval_results.json`: one entry for the validation file, and the average; in percent."""
        dataset = context.config.data.val.stem if context.config.data.val else "val"
        entry: dict[str, Any] = {"dataset": dataset, "metric": "accuracy", "split": "validation", "step": step}
        entry |= self._scores("val/", "val/task_metrics/accuracy", _WEIGHTS, len(context.val))
        if self.kv_error_KLH is not None:
            entry["kv_error"] = dict(zip(TENSORS, self.kv_error_KLH.tolist(), strict=True))
        by_dataset: dict[str, dict[str, Any]] = {}
        for name, count in Counter(record.dataset for record in context.val if record.dataset).items():
            prefix = f"{BY_DATASET}{name}/"
            by_dataset[name] = self._scores(prefix, f"{prefix}accuracy", f"{prefix}{_WEIGHTS}", count)
        if by_dataset:
            entry["by_dataset"] = by_dataset
        return {dataset: entry, "average": entry["score"]}

    def _scores(self, prefix: str, accuracy: str, weights: str, count: int) -> dict[str, Any]:
        """The results of `count` samples. The other arguments are names of metrics, or their beginnings."""
        scores: dict[str, Any] = {"score": 100 * self.metrics[accuracy], "num_examples": count}
        scores |= {name: self.metrics[prefix + name] for name in ("loss", "kv_loss") if prefix + name in self.metrics}
        shares = {name.removeprefix(weights): x for name, x in self.metrics.items() if name.startswith(weights)}
        return scores | ({"routing_weights_mean": shares} if shares else {})


@torch.no_grad()
def validate(module: nn.Module, context: TrainingContext, fetch: Fetch, device: torch.device) -> Validation:
    """Evaluates the validation records, which the ranks share. All ranks must call it.

    Args:
        module: the engine's module, in evaluation mode.
        context: the run.
        fetch: returns a micro-batch with the teachers' K/V.
        device: of this rank.
    """
    latent = context.config.student.mode == "latent"
    sums: dict[str, dict[str, float]] = {}
    error_shape: torch.Size | None = None
    batches = list(_batches(context.val, context.config.run.micro_batch))
    for dataset, chosen, counted in show_progress("validating", batches):
        # Records that only fill up a batch count in no mean, but every rank runs the same number of passes.
        losses = module(fetch(chosen).first(max(1, counted)))
        texts = answer(
            context.model.student,
            context.collator,
            context.tokenizer,
            chosen,
            context.config.data.answer_tokens,
            device,
            latent=latent,
        )
        correct = [is_correct(text, record, latent=latent) for text, record in zip(texts, chosen, strict=True)]
        found = {"count": float(counted), "accuracy": float(sum(correct[:counted]))}
        for name, value in losses.items():
            if name in ("loss", "kv_loss") or name.startswith("routing/"):
                found[name] = float(value) * counted
        if "kv_error_KLH" in losses:
            error_shape = losses["kv_error_KLH"].shape
            found |= {f"{_ERROR}{i}": x * counted for i, x in enumerate(losses["kv_error_KLH"].flatten().tolist())}
        _add(sums.setdefault(dataset, {}), found)
    totals: dict[str, float] = {}
    for one in sums.values():
        _add(totals, one)
    means = mean_over_ranks(totals, device)
    metrics = {"val/loss": means["loss"], "val/task_metrics/accuracy": means["accuracy"]}
    metrics |= {name: value for name, value in means.items() if name.startswith("routing/")}
    metrics |= _by_dataset(sums, device)
    if not context.sources:
        return Validation(metrics, None)
    metrics["val/kv_loss"] = means["kv_loss"]
    if error_shape is None:
        return Validation(metrics, None)
    errors = [means[f"{_ERROR}{i}"] for i in range(error_shape.numel())]
    error_KLH = torch.tensor(errors, dtype=torch.float64).reshape(error_shape)
    for tensor, error_LH in zip(TENSORS, error_KLH, strict=True):
        layers = error_LH.mean(dim=1).tolist()
        metrics |= {f"val/kv_loss/{tensor}/layer{layer}": value for layer, value in enumerate(layers)}
    return Validation(metrics, error_KLH)


def _batches(records: Sequence[Record], micro_batch: int) -> Iterator[tuple[str, list[Record], int]]:
    """This rank's batches: their dataset, their records, and how many of the records count."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for dataset in dict.fromkeys(record.dataset for record in records):
        group = [record for record in records if record.dataset == dataset]
        for indices, counted in rank_batches(len(group), micro_batch, rank, world_size):
            yield dataset, [group[index] for index in indices], counted


def _by_dataset(sums: Mapping[str, dict[str, float]], device: torch.device) -> dict[str, float]:
    """The named datasets' metrics. All ranks must have the same datasets in the same order."""
    metrics: dict[str, float] = {}
    for dataset, one in sums.items():
        means = mean_over_ranks(one, device) if dataset else {}
        kept = [name for name in means if name in ("accuracy", "loss", "kv_loss") or name.startswith(_WEIGHTS)]
        metrics |= {f"{BY_DATASET}{dataset}/{name}": means[name] for name in kept}
    return metrics


def _add(totals: dict[str, float], found: dict[str, float]) -> None:
    for name, value in found.items():
        totals[name] = totals.get(name, 0.0) + value

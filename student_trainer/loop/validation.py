"""Validation: losses, accuracy of the student's answers, and the error of its K/V by layer and head.

Every metric is a mean over samples, whatever the ranks and micro-batches: cross-entropy and accuracy over all of them,
K/V metrics over those with K/V of any teacher.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from data.records import Record
from kvcore.errors import KVDistillError
from kvcore.types import TENSORS, Tensor
from student_trainer.loop.calibrate import Fetch
from student_trainer.loop.greedy_answers import answer, is_correct, rank_batches, warn_of_unfinished
from student_trainer.loop.training_context import TrainingContext
from student_trainer.model.distill_model import TrainBatch
from student_trainer.monitoring.phase_progress import show_progress
from student_trainer.monitoring.run_state import Prediction

BY_DATASET = "val/by_dataset/"
PERPLEXITY = "perplexity"
# The losses of a validation, in the order in which they are shown.
LOSSES = ("ce_loss", "answer_ce", PERPLEXITY, "step_ce", "kv_loss", "loss")
_UNFINISHED = "unfinished_answers"
_ROUTING = "routing/"
_WEIGHTS = f"{_ROUTING}weights_mean/"
# The metrics of a dataset that `results` copies.
_RESULTS = (*LOSSES, _UNFINISHED)
# The entries of the flattened kv_error_KLH, among the sums.
_ERROR = "kv_error/"
# Samples of each dataset whose answers are kept.
_SHOWN = 4
# The same of each latent, and how many samples have a target for it.
_LATENT_ERROR, _LATENT_TARGETS = "latent_error/", "latent_targets/"
_BY_LATENT = "val/kv_loss/latent"


@dataclass(frozen=True, slots=True)
class Validation:
    """The result of one validation.

    `metrics`: by their names in docs/monitoring.md. `kv_error_KLH`: normalised error by tensor, layer and head.
    `predictions`: of this rank's first samples of each dataset.
    """

    metrics: dict[str, float]
    kv_error_KLH: Tensor | None
    predictions: list[Prediction]

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
        scores |= {name: self.metrics[prefix + name] for name in _RESULTS if prefix + name in self.metrics}
        shares = {name.removeprefix(weights): x for name, x in self.metrics.items() if name.startswith(weights)}
        return scores | ({"routing_weights_mean": shares} if shares else {})


@torch.no_grad()
def validate(module: nn.Module, context: TrainingContext, fetch: Fetch, device: torch.device) -> Validation:
    """Evaluates the validation records, which the ranks share. All ranks must call it.

    Args:
        module: the engine's module, in evaluation mode.
        context: the run.
        fetch: fetches the teachers' K/V.
        device: of this rank.
    """
    latent = context.config.student.mode == "latent"
    sums: dict[str, dict[str, float]] = {}
    error_shape: torch.Size | None = None
    predictions: dict[str, list[Prediction]] = {}
    batches = list(_batches(context.val, context.config.run.micro_batch))
    fetched = fetch([chosen for _, chosen, _ in batches])
    for (dataset, chosen, counted), whole in zip(show_progress("validating", batches), fetched, strict=True):
        # Records that only fill up a batch count in no mean, but every rank runs the same number of passes.
        batch = whole.first(max(1, counted))
        losses = module(batch)
        answers = answer(
            context.model.student,
            context.collator,
            context.tokenizer,
            chosen,
            context.answer_tokens,
            device,
            latent=latent,
            together=context.config.run.zero_stage == 3,
        )
        correct = [is_correct(given.text, record, latent=latent) for given, record in zip(answers, chosen, strict=True)]
        shown = predictions.setdefault(dataset, [])
        for place in range(min(counted, _SHOWN - len(shown))):
            record, text = chosen[place], answers[place].text.strip()
            shown.append(Prediction(record.prompt.strip(), record.answer.strip(), text, correct[place]))
        found = {"count": float(counted), "kv_count": float(_with_kv(batch, losses, counted))}
        found["accuracy"] = float(sum(correct[:counted]))
        found[_UNFINISHED] = float(sum(not given.finished for given in answers[:counted]))
        for name, value in losses.items():
            if name in LOSSES or name.startswith(_ROUTING):
                found[name] = float(value) * _weight(name, found)
        if "kv_error_KLH" in losses:
            error_shape = losses["kv_error_KLH"].shape
            errors = losses["kv_error_KLH"].flatten().tolist()
            found |= {f"{_ERROR}{i}": error * found["kv_count"] for i, error in enumerate(errors)}
        if "kv_error_BM" in losses:
            found |= _of_latents(losses["kv_error_BM"][:counted], losses["kv_target_BM"][:counted])
        _add(sums.setdefault(dataset, {}), found)
    totals: dict[str, float] = {}
    for one in sums.values():
        _add(totals, one)
    means = _means(totals, device)
    metrics = {f"val/{name}": means[name] for name in _RESULTS if name in means}
    metrics["val/task_metrics/accuracy"] = means["accuracy"]
    warn_of_unfinished(means[_UNFINISHED], context.answer_tokens)
    metrics |= {name: value for name, value in means.items() if name.startswith(_ROUTING)}
    metrics |= _by_dataset(sums, device)
    examples = [one for group in predictions.values() for one in group]
    metrics |= _by_latent(means)
    if error_shape is None or f"{_ERROR}0" not in means:
        return Validation(metrics, None, examples)
    errors = [means[f"{_ERROR}{i}"] for i in range(error_shape.numel())]
    error_KLH = torch.tensor(errors, dtype=torch.float64).reshape(error_shape)
    for tensor, error_LH in zip(TENSORS, error_KLH, strict=True):
        layers = error_LH.mean(dim=1).tolist()
        metrics |= {f"val/kv_loss/{tensor}/layer{layer}": value for layer, value in enumerate(layers)}
    return Validation(metrics, error_KLH, examples)


def judged_by(best_by: str) -> str:
    """The name of the metric that `run.best_by` selects the best model by."""
    return "val/task_metrics/accuracy" if best_by == "accuracy" else f"val/{best_by}"


def quality(metrics: Mapping[str, float], best_by: str) -> tuple[float, float]:
    """How good a validation is, by `run.best_by`, then by the cross-entropy: higher is better.

    Raises:
        KVDistillError: `best_by` is `kv_loss`, and no validation sample has K/V.
    """
    name = judged_by(best_by)
    if name not in metrics:
        raise KVDistillError("run.best_by: no validation sample has K/V to compare 'kv_loss' by; use 'ce_loss'")
    return metrics[name] if best_by == "accuracy" else -metrics[name], -metrics["val/ce_loss"]


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
        means = _means(one, device) if dataset else {}
        kept = [name for name in means if name in ("accuracy", *_RESULTS) or name.startswith(_WEIGHTS)]
        metrics |= {f"{BY_DATASET}{dataset}/{name}": means[name] for name in kept}
    return metrics


def _of_latents(error_BM: Tensor, target_BM: Tensor) -> dict[str, float]:
    """Sums over samples: the error of each latent, and how many samples have a target for it."""
    errors, targets = (error_BM * target_BM).sum(dim=0).tolist(), target_BM.sum(dim=0).tolist()
    found = {f"{_LATENT_ERROR}{i}": error for i, error in enumerate(errors)}
    return found | {f"{_LATENT_TARGETS}{i}": float(count) for i, count in enumerate(targets)}


def _by_latent(means: Mapping[str, float]) -> dict[str, float]:
    """The KV loss of each latent, counted from 1, for which any sample has a target."""
    counts = {
        int(name.removeprefix(_LATENT_TARGETS)): n for name, n in means.items() if name.startswith(_LATENT_TARGETS)
    }
    return {f"{_BY_LATENT}{i + 1}": means[f"{_LATENT_ERROR}{i}"] / n for i, n in sorted(counts.items()) if n}


def _with_kv(batch: TrainBatch, losses: Mapping[str, Tensor], counted: int) -> int:
    """How many of the first `counted` samples have K/V of any teacher, or of the student's own reading."""
    masks = [kv.mask_BM for kv in batch.teachers]
    if not masks and "kv_target_BM" in losses:
        masks = [losses["kv_target_BM"]]
    present = [mask_BM[:counted].any(dim=1) for mask_BM in masks]
    return int(torch.stack(present).any(dim=0).sum()) if present else 0


def _weight(name: str, counts: Mapping[str, float]) -> float:
    """The number of samples that a metric is a mean over."""
    of_kv = name == "kv_loss" or name.startswith((_ROUTING, _ERROR))
    return counts["kv_count" if of_kv else "count"]


def _means(sums: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Means over the samples of all ranks, and the perplexity. A metric without any sample is left out."""
    names = sorted(sums)
    totals = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    values = dict(zip(names, totals.tolist(), strict=True))
    counts = {name: values.pop(name) for name in ("count", "kv_count")}
    means = {name: value / _weight(name, counts) for name, value in values.items() if _weight(name, counts)}
    # torch gives infinity where math.exp raises.
    means[PERPLEXITY] = float(torch.tensor(means["ce_loss"], dtype=torch.float64).exp())
    return means


def _add(totals: dict[str, float], found: dict[str, float]) -> None:
    for name, value in found.items():
        totals[name] = totals.get(name, 0.0) + value

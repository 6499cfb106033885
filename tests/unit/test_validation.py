"""Tests of validation metrics, in total and per dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from data.records import Record
from student_trainer.loop.calibrate import calibrate
from student_trainer.loop.sample_order import SampleOrder
from student_trainer.loop.training_context import TrainingContext
from student_trainer.loop.validation import Validation, validate
from student_trainer.model.distill_model import DistillModel
from tests.support.kv_fakes import MemorySource
from tests.support.training_parts import (
    RECORDS,
    TOKENIZER,
    collator,
    distill_model,
    one_rank,
    train_batch,
    train_config,
)

CPU = torch.device("cpu")
SIMILARITY: dict[str, Any] = {"kind": "similarity", "temperature": 0.2, "temperature_floor": 0.1}
# Two datasets, interleaved. Neither fills its last batch.
MIXED = [replace(record, dataset=("even", "odd")[i % 2]) for i, record in enumerate(RECORDS[40:50])]
EVEN, ODD = MIXED[::2], MIXED[1::2]


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(scope="module")
def model() -> DistillModel:
    torch.manual_seed(0)
    model = distill_model({"ada": 1.0, "ben": 1.0}, fuse=SIMILARITY)
    with one_rank():
        calibrate(model, RECORDS[:40], range(40), lambda chosen: train_batch(model, chosen), 40, lambda _: None)
    return model.eval()


def validated(model: DistillModel, records: Sequence[Record]) -> tuple[Validation, TrainingContext]:
    config = train_config(fuse=SIMILARITY, run={"micro_batch": 2, "global_batch": 2}, data={"answer_tokens": 2})
    sources = {name: MemorySource() for name in model.weights}
    order = SampleOrder(config.run, 40, 0, 1)
    context = TrainingContext(config, TOKENIZER, collator(), (), records, sources, model, order, None, {})
    return validate(model, context, lambda chosen: train_batch(model, chosen), CPU), context


def test_metrics_of_a_dataset_depend_only_on_its_records(model: DistillModel) -> None:
    found, context = validated(model, MIXED)
    for name, group in (("even", EVEN), ("odd", ODD)):
        alone, _ = validated(model, [replace(record, dataset="") for record in group])
        below = f"val/by_dataset/{name}"
        assert found.metrics[f"{below}/loss"] == pytest.approx(alone.metrics["val/loss"])
        assert found.metrics[f"{below}/kv_loss"] == pytest.approx(alone.metrics["val/kv_loss"])
        for teacher in model.weights:
            weight = f"routing/weights_mean/{teacher}"
            assert found.metrics[f"{below}/{weight}"] == pytest.approx(alone.metrics[weight])
    entry = found.results(context, 7)["none"]
    assert entry["by_dataset"].keys() == {"even", "odd"}
    for one in entry["by_dataset"].values():
        assert one["num_examples"] == 5
        assert sum(one["routing_weights_mean"].values()) == pytest.approx(1.0)
        assert {"score", "loss", "kv_loss"} <= one.keys()


def test_total_is_the_mean_over_the_records_of_all_datasets(model: DistillModel) -> None:
    mixed, _ = validated(model, MIXED)
    plain, context = validated(model, [replace(record, dataset="") for record in MIXED])
    for name in ("val/loss", "val/kv_loss", "val/task_metrics/accuracy", "routing/weights_mean/ada"):
        assert mixed.metrics[name] == pytest.approx(plain.metrics[name], rel=1e-4), name
    assert not [name for name in plain.metrics if name.startswith("val/by_dataset")]
    assert "by_dataset" not in plain.results(context, 7)["none"]

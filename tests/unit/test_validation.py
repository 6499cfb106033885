"""Tests of validation metrics, in total and per dataset."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from data.records import Record
from kvcore.errors import FieldError
from student_trainer.kv_sources import KVSource
from student_trainer.kv_sources.shuffled import ShuffledControl
from student_trainer.loop.calibrate import calibrate
from student_trainer.loop.sample_order import SampleOrder
from student_trainer.loop.training_context import TrainingContext
from student_trainer.loop.validation import LOSSES, Validation, validate
from student_trainer.model.distill_model import DistillModel, TrainBatch
from student_trainer.model.generation import TextEnd, after_latents, generate
from tests.support.kv_fakes import MemorySource
from tests.support.training_parts import (
    RECORDS,
    TOKENIZER,
    collator,
    distill_model,
    fetch_for,
    one_rank,
    train_batch,
    train_config,
)

CPU = torch.device("cpu")
# The losses of a student without step blocks.
FOUND = [name for name in LOSSES if name != "step_ce"]
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
        calibrate(model, RECORDS[:40], range(40), fetch_for(model), 40, lambda _: None)
    return model.eval()


def validated(
    model: DistillModel,
    records: Sequence[Record],
    micro_batch: int = 2,
    without_kv: Collection[str] = (),
    tokenizer: PreTrainedTokenizerFast = TOKENIZER,
    without_last: Collection[str] = (),
) -> tuple[Validation, TrainingContext]:
    """Validate on records. `without_kv`: ids of records without any K/V; `without_last`: without the last slot's."""

    def fetch(batches: Iterable[Sequence[Record]]) -> Iterator[TrainBatch]:
        for chosen in batches:
            batch = train_batch(model, chosen)
            for kv in batch.teachers:
                kv.mask_BM[[record.id in without_kv for record in chosen]] = False
                kv.mask_BM[[record.id in without_last for record in chosen], -1] = False
            yield batch

    run = {"micro_batch": micro_batch, "global_batch": micro_batch}
    config = train_config(fuse=SIMILARITY, run=run, data={"answer_tokens": 2})
    sources = {name: MemorySource() for name in model.weights}
    order = SampleOrder(config.run, 40, 0, 1)
    context = TrainingContext(config, tokenizer, collator(), (), records, sources, model, order, None, {})
    return validate(model, context, fetch, CPU), context


def test_metrics_of_a_dataset_depend_only_on_its_records(model: DistillModel) -> None:
    found, context = validated(model, MIXED)
    for name, group in (("even", EVEN), ("odd", ODD)):
        alone, _ = validated(model, [replace(record, dataset="") for record in group])
        below = f"val/by_dataset/{name}"
        for loss in FOUND:
            assert found.metrics[f"{below}/{loss}"] == pytest.approx(alone.metrics[f"val/{loss}"]), loss
        for teacher in model.weights:
            weight = f"routing/weights_mean/{teacher}"
            assert found.metrics[f"{below}/{weight}"] == pytest.approx(alone.metrics[weight])
    entry = found.results(context, 7)["none"]
    assert entry["by_dataset"].keys() == {"even", "odd"}
    for one in entry["by_dataset"].values():
        assert one["num_examples"] == 5
        assert sum(one["routing_weights_mean"].values()) == pytest.approx(1.0)
        assert {"score", *FOUND} <= one.keys()


def test_total_is_the_mean_over_the_records_of_all_datasets(model: DistillModel) -> None:
    mixed, _ = validated(model, MIXED)
    plain, context = validated(model, [replace(record, dataset="") for record in MIXED])
    losses = (f"val/{name}" for name in FOUND)
    for name in (*losses, "val/task_metrics/accuracy", "routing/weights_mean/ada", "routing/entropy"):
        assert mixed.metrics[name] == pytest.approx(plain.metrics[name], rel=1e-4), name
    assert not [name for name in plain.metrics if name.startswith("val/by_dataset")]
    assert "by_dataset" not in plain.results(context, 7)["none"]


def test_unfinished_answers_are_a_share_of_the_records(model: DistillModel) -> None:
    found, context = validated(model, MIXED)
    assert found.metrics["val/unfinished_answers"] == 1.0
    assert found.results(context, 7)["none"]["unfinished_answers"] == 1.0
    start = after_latents(model.student, *collator().prompts([record.prompt for record in MIXED]))
    first = [row.ids[0] for row in generate(model.student.lm, start, 1, TextEnd(TOKENIZER, []))]
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first[0])
    found, _ = validated(model, MIXED, tokenizer=tokenizer)
    assert found.metrics["val/unfinished_answers"] == 1 - first.count(first[0]) / len(first)
    ended = first[::2].count(first[0])
    assert found.metrics["val/by_dataset/even/unfinished_answers"] == pytest.approx(1 - ended / len(EVEN))


def test_kv_metrics_are_means_over_the_samples_with_kv(model: DistillModel) -> None:
    """Samples without K/V are spread unevenly over the micro-batches."""
    missing = [EVEN[index].id for index in (0, 1, 4)]
    present, _ = validated(model, [record for record in EVEN if record.id not in missing])
    everything, _ = validated(model, EVEN)
    for micro_batch in (2, 3):
        found, _ = validated(model, EVEN, micro_batch, missing)
        for name in ("val/kv_loss", "val/kv_loss/v/layer1", "routing/weights_mean/ada"):
            assert found.metrics[name] == pytest.approx(present.metrics[name], rel=1e-4), name
        assert found.kv_error_KLH is not None
        torch.testing.assert_close(found.kv_error_KLH, present.kv_error_KLH)
        assert found.metrics["val/ce_loss"] == pytest.approx(everything.metrics["val/ce_loss"], rel=1e-4)


def test_kv_loss_of_a_latent_is_a_mean_over_the_samples_with_a_target_for_it(model: DistillModel) -> None:
    """One sample has no K/V and another none for its last latent; the micro-batches do not matter."""
    without_kv, short = EVEN[1].id, EVEN[3].id
    alone = {record.id: model(train_batch(model, [record])) for record in EVEN}
    latents = alone[short]["kv_error_BM"].shape[1]
    assert latents > 1
    for micro_batch in (2, 3):
        found, _ = validated(model, EVEN, micro_batch, [without_kv], without_last=[short])
        for place in range(latents):
            left_out = {without_kv, short} if place == latents - 1 else {without_kv}
            errors = [float(one["kv_error_BM"][0, place]) for name, one in alone.items() if name not in left_out]
            assert found.metrics[f"val/kv_loss/latent{place + 1}"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
        assert f"val/kv_loss/latent{latents + 1}" not in found.metrics
    whole, _ = validated(model, EVEN)
    by_latent = [whole.metrics[f"val/kv_loss/latent{place + 1}"] for place in range(latents)]
    assert sum(by_latent) / latents == pytest.approx(whole.metrics["val/kv_loss"], rel=1e-4)


def test_without_any_kv_no_kv_metric_is_reported(model: DistillModel) -> None:
    found, context = validated(model, EVEN, without_kv=[record.id for record in EVEN])
    assert not [name for name in found.metrics if "kv" in name or "routing" in name]
    assert found.metrics["val/perplexity"] > 1.0
    assert "kv_error" not in found.results(context, 7)["none"]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_are_requested_from_all_teachers_ahead(model: DistillModel, prefetch: int) -> None:
    config = train_config(teachers=list(model.weights), kv={"prefetch": prefetch})
    sources = {name: MemorySource() for name in model.weights}
    order = SampleOrder(config.run, 40, 0, 1)
    context = TrainingContext(config, TOKENIZER, collator(), (), (), sources, model, order, None, {})
    batches = [EVEN[at : at + 1] for at in range(5)]
    seen: list[str] = []
    for place, (records, pending) in enumerate(context.submitted(batches, control=False)):
        assert len(pending) == len(sources)
        for source in sources.values():
            assert len(source.submitted) == min(place + 1 + prefetch, 5)
            assert source.submitted[place] == [records[0].id]
        seen.append(records[0].id)
    assert seen == [record.id for record in EVEN]


def test_only_training_is_under_the_control(model: DistillModel) -> None:
    config, inner = train_config(teachers=["ada"]), MemorySource()
    sources: dict[str, KVSource] = {"ada": ShuffledControl(inner)}
    order = SampleOrder(config.run, 40, 0, 1)
    context = TrainingContext(config, TOKENIZER, collator(), (), (), sources, model, order, None, {})
    (own,), (other,) = (context.submit(EVEN[:1], control=control) for control in (False, True))
    inner.missing = {EVEN[0].id}
    assert [result.sample_id for result in own.result()] == [EVEN[0].id]
    with pytest.raises(FieldError, match="at least 2 samples"):
        other.result()


def test_answers_of_the_first_records_of_each_dataset_are_kept(model: DistillModel) -> None:
    found, _ = validated(model, MIXED)
    records = [*EVEN[:4], *ODD[:4]]
    assert [one.prompt for one in found.predictions] == [record.prompt.strip() for record in records]
    assert [one.expected for one in found.predictions] == [record.answer.strip() for record in records]
    assert [one.correct for one in found.predictions] == [
        one.answer.split() == one.expected.split() for one in found.predictions
    ]

"""Tests of the survey of all samples before the first step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data.collate import Collator
from data.records import Record
from kvcore.errors import FieldError
from student_trainer.config import TrainConfig
from student_trainer.loop import ds_engine
from student_trainer.loop.data_survey import Split, log_padding, survey, with_answer_tokens
from student_trainer.loop.sample_order import SampleOrder
from tests.support.text_tokenizers import LLAMA3, byte_level
from tests.support.training_parts import collator, one_rank, train_config

TRAIN = [Record(f"t{number}", f"Start {number}.", f" Add {number}: {number}.", f" {number}") for number in range(30)]
VAL = [Record(f"v{number}", f"Start at {number}.", " Add 1.", f" {number}") for number in range(10)]
TEACHERS: dict[str, Any] = {"teachers": [{"name": "ada", "endpoints": ["localhost:1"]}]}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ds_engine, "device", lambda: torch.device("cpu"))
    with one_rank():
        yield


def config_of(mode: str = "latent", *, teachers: bool = False, **sections: Any) -> TrainConfig:
    config = train_config(mode, **sections)
    return TrainConfig.model_validate(config.model_dump() | TEACHERS, strict=False) if teachers else config


def surveyed(config: TrainConfig, train: Sequence[Record] = TRAIN, val: Sequence[Record] = VAL) -> list[Split]:
    return survey(config, collator(), train, val)


def unreasoned(records: Sequence[Record], *places: int) -> list[Record]:
    return [replace(record, reasoning="") if place in places else record for place, record in enumerate(records)]


def test_counted_tokens_are_those_of_training() -> None:
    unusual = [*TRAIN, Record("u", "思考:Größe", "", " 🙂 naïve"), *VAL]
    (split,) = surveyed(config_of(), unusual, [])
    for record, counted, length in zip(unusual, split.tokens_N3.tolist(), split.lengths().tolist(), strict=True):
        tokens = collator().tokens(record)
        assert counted == [len(tokens.prompt_ids), len(tokens.reasoning_ids), len(tokens.answer_ids)]
        assert length == int(collator()([record]).text_mask_BT.sum())


def test_all_overlong_samples_are_refused_at_once() -> None:
    (split,) = surveyed(config_of(), TRAIN, [])
    train = [*TRAIN[:5], Record("long", "Start." * 50, "", " 1"), Record("longer", "Start." * 90, "", " 1")]
    longest = int(surveyed(config_of(), train[-1:], [])[0].lengths()[0])
    limit = int(split.lengths().max())
    assert surveyed(config_of(data={"max_tokens": limit}), TRAIN, [])
    with pytest.raises(FieldError) as caught:
        surveyed(config_of(data={"max_tokens": limit}), train, [Record("val", "Start." * 60, " x", " 1")])
    assert str(caught.value) == (
        f"data.max_tokens: 2 of 7 training samples have more than {limit} student tokens (the first: 'long'); 1 of 1 "
        f"validation samples have more than {limit} student tokens (the first: 'val'); the longest has {longest}; "
        "raise the limit or remove them"
    )


def test_samples_without_reasoning_are_refused_if_its_kv_are_requested(caplog: pytest.LogCaptureFixture) -> None:
    train = unreasoned(TRAIN, 3, 4)
    with pytest.raises(
        FieldError, match=r"kv\.selection\.span: .* 2 of 30 training .* no reasoning \(the first: 't3'\)"
    ):
        surveyed(config_of(teachers=True), train)
    with pytest.raises(
        FieldError, match=r"but 1 of 10 validation samples have no reasoning \(the first: 'v9'\); remove"
    ):
        surveyed(config_of(teachers=True), val=unreasoned(VAL, 9))
    surveyed(config_of(teachers=True))
    assert "no reasoning" not in caplog.text
    for accepting in (
        config_of(),
        config_of(teachers=True, kv={"on_missing": "mask"}),
        config_of("token", teachers=True, kv={"selection": {"selector": "full", "span": "all"}}),
    ):
        caplog.clear()
        surveyed(accepting, train)
        assert "2 of 30 training samples have no reasoning (the first: 't3')" in caplog.text


def test_samples_with_an_end_token_in_their_text_are_refused() -> None:
    ended = [*TRAIN[:4], Record("e", "Start.", " Add 1.</s> And 2.", " 3")]
    with pytest.raises(FieldError, match=r"data\.train: 1 of 5 training .* '</s>' in their .* 'e'\); remove"):
        surveyed(config_of(), ended)
    with pytest.raises(FieldError, match=r"data\.val: 1 of 5 validation"):
        surveyed(config_of(), val=ended)
    assert surveyed(config_of(), [replace(ended[-1], prompt="</s>Start.", reasoning="")])


def test_tokenizer_that_ends_every_text_is_refused() -> None:
    ending = Collator(byte_level(LLAMA3, eos=True), 512)
    with pytest.raises(FieldError, match=r"student\.path: .* ends every text"):
        survey(config_of(), ending, TRAIN, VAL)


@pytest.mark.parametrize("mode", ["latent", "token"])
def test_answers_that_do_not_fit_are_reported_with_a_number_that_is_enough(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    val = [*VAL[:3], Record("w", "Start.", " Add 4, then add 5.", " The answer is 9, not 5.")]
    tokens = [collator().tokens(record) for record in val]
    written = [len(row.answer_ids) + 1 + (len(row.reasoning_ids) if mode == "token" else 0) for row in tokens]
    surveyed(config_of(mode, data={"answer_tokens": max(written)}), val=val)
    assert "cut off" not in caplog.text
    surveyed(config_of(mode, data={"answer_tokens": max(written) - 1}), val=val)
    assert "1 of 4 validation samples" in caplog.text
    assert "(the first: 'w'): 25.0 % are cut off" in caplog.text
    assert f"data.answer_tokens {max(written)} is enough" in caplog.text
    assert ("with their reasoning" in caplog.text) == (mode == "token")


@pytest.mark.parametrize("mode", ["latent", "token"])
def test_answer_tokens_are_by_default_a_quarter_more_than_the_longest(mode: str) -> None:
    config = config_of(mode)
    splits = surveyed(config)
    parts = slice(1, 3) if mode == "token" else slice(2, 3)
    longest = int(splits[1].tokens_N3[:, parts].sum(axis=1).max()) + 1
    assert with_answer_tokens(config, splits).data.answer_tokens == int(np.ceil(1.25 * longest))
    chosen = config_of(mode, data={"answer_tokens": 3})
    assert with_answer_tokens(chosen, splits) is chosen
    assert with_answer_tokens(config, splits[:1]) is config


def test_default_answer_tokens_are_limited_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    config = config_of("token")
    splits = surveyed(config, val=[*VAL, Record("long", "Start.", " add" * 450, " 1")])
    assert with_answer_tokens(config, splits).data.answer_tokens == 512
    assert "(the first: 'long'): 9.1 % are cut off" in caplog.text


def test_training_prompts_in_the_validation_samples_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    surveyed(config_of())
    assert "prompt of a training sample" not in caplog.text
    surveyed(config_of(), val=[*VAL, replace(TRAIN[4], id="again", answer=" x")])
    assert "1 of 11 validation samples have the prompt of a training sample (the first: 'again')" in caplog.text


def test_log_has_counts_lengths_and_padding(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = config_of(run={"global_batch": 2, "micro_batch": 2, "steps": None, "epochs": 2})
    splits = surveyed(config)
    lengths = splits[0].lengths()
    assert (
        f"30 training samples; student tokens: {lengths.mean():.0f} on average, at most {lengths.max()}" in caplog.text
    )
    assert "10 validation samples" in caplog.text
    order = SampleOrder(config.run, 30, 0, 1)
    batches = list(order.micro_batches(0))[:15]
    positions = sum(2 * max(lengths[batch]) for batch in batches)
    log_padding(order, splits[0])
    assert (
        f"data: {100 * (1 - lengths.sum() / positions):.1f} % of the text positions in micro-batches are padding"
        in caplog.text
    )

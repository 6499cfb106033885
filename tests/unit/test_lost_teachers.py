"""Tests of training that goes on without lost teachers, up to its limits."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch

from kvcore.config import parse
from kvcore.errors import TeacherUnavailableError
from kvcore.types import MissingKV
from student_trainer.config import KVConfig
from student_trainer.kv_sources import KVResult, PendingKV
from student_trainer.loop import ds_engine
from student_trainer.loop.lost_teachers import LostTeachers
from student_trainer.loop.metric_accumulator import MetricAccumulator
from student_trainer.loop.sample_order import SampleOrder
from student_trainer.loop.training_context import TrainingContext
from tests.support.kv_fakes import MemorySource, samples
from tests.support.training_parts import RECORDS, TOKENIZER, collator, train_config

SOME = RECORDS[:2]


def lost(name: str = "ada") -> PendingKV:
    def result() -> list[KVResult]:
        raise TeacherUnavailableError(name, "no endpoint answered for 30.0 s")

    return PendingKV(result)


def answered() -> PendingKV:
    return MemorySource().submit([])


def teachers(count: int = 2, **kv: Any) -> LostTeachers:
    return LostTeachers(parse({"on_lost": "mask", **kv}, KVConfig), count)


def test_by_default_a_lost_teacher_is_an_error() -> None:
    with pytest.raises(TeacherUnavailableError, match="no endpoint answered"):
        LostTeachers(KVConfig(), 1).results("ada", lost(), SOME)


def test_the_kv_of_a_lost_teacher_are_missing_and_masked_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    both = teachers()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            results, on_missing = both.results("ada", lost(), SOME)
            assert on_missing == "mask"
            assert [one.sample_id for one in results if isinstance(one, MissingKV)] == [each.id for each in SOME]
            assert both.results("ben", answered(), SOME)[1] == "fail", "another teacher's samples must have K/V"
            both.check()
            both.step_done()
        both.results("ada", answered(), SOME)
    assert caplog.messages == [
        "teacher 'ada': no endpoint answered for 30.0 s; training continues without its K/V for up to 100 steps",
        "teacher 'ada' answers again, after 3 steps without it",
    ]


def test_a_teacher_may_be_lost_for_a_limited_number_of_steps_in_a_row() -> None:
    both = teachers(lost_steps=2)

    def step(pending: PendingKV) -> None:
        for _ in range(2):  # micro-batches
            both.results("ada", pending, SOME)
            both.check()
        both.step_done()

    for pending in (lost(), lost(), answered(), lost(), lost()):
        step(pending)
    with pytest.raises(TeacherUnavailableError, match=r"'ada': lost for 2 steps, and kv\.lost_steps is 2; no endpoint"):
        step(lost())


def test_the_run_ends_with_fewer_teachers_than_it_needs() -> None:
    both = teachers(min_teachers=1)
    both.results("ada", lost(), SOME)
    both.results("ben", answered(), SOME)
    both.check()
    both.results("ada", lost(), SOME)
    both.results("ben", lost("ben"), SOME)
    with pytest.raises(TeacherUnavailableError, match=r"0 of 2 teachers answer, and kv\.min_teachers is 1"):
        both.check()


def test_more_teachers_than_there_are_cannot_be_needed() -> None:
    with pytest.raises(ValueError, match=r"^kv\.min_teachers: 2, and there are 1 teachers"):
        train_config(teachers=["ada"], kv={"selection": {"selector": "right", "budget": 3}, "min_teachers": 2})


def test_a_batch_without_one_teacher_masks_its_samples_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ds_engine, "device", lambda: torch.device("cpu"))
    config, source = train_config(teachers=["ada", "ben"]), MemorySource()
    model: Any = None
    context = TrainingContext(
        config,
        TOKENIZER,
        collator(),
        RECORDS,
        (),
        {"ada": source, "ben": source},
        model,
        SampleOrder(config.run, len(RECORDS), 0, 1),
        None,
        {},
        lost=teachers(),
    )
    batch = context.batch(SOME, MetricAccumulator(), [lost(), source.submit(samples(len(SOME)))])
    assert [kv.mask_BM.any(dim=1).tolist() for kv in batch.teachers] == [[False, False], [True, True]]
    with pytest.raises(TeacherUnavailableError):  # As in calibration.
        dataclasses.replace(context, lost=None).batch(SOME, MetricAccumulator(), [lost(), lost("ben")])

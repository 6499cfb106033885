"""Tests of greedy answers: generation and comparison word by word."""

from __future__ import annotations

import copy

import pytest
import torch

from data.records import Record
from student_trainer.loop.greedy_answers import answer, is_correct, mean_over_ranks, warn_of_unfinished
from student_trainer.model.generation import Answer, TextEnd, after_latents, after_prompt, generate
from student_trainer.model.latent import LatentStudent
from tests.support.training_parts import PASSES, RECORDS, TOKENIZER, collator, one_rank, tiny_student

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("generated", "expected"),
    [(" 12", True), ("12 ", True), ("12", True), ("1 2", False), ("112", False), ("so 12", False), ("", False)],
)
def test_in_latent_mode_the_whole_text_must_equal_the_answer(generated: str, expected: bool) -> None:
    assert is_correct(generated, Record("a", "p", "r", " 12"), latent=True) is expected


@pytest.mark.parametrize(
    ("generated", "expected"),
    [("3 + 9 = 12; is 12", True), ("12\n", True), ("12 it is", False), ("112", False), ("", False)],
)
def test_in_token_mode_the_last_words_must_equal_the_answer(generated: str, expected: bool) -> None:
    assert is_correct(generated, Record("a", "p", "r", " 12"), latent=False) is expected


def test_all_words_of_an_answer_are_compared() -> None:
    record = Record("a", "p", "r", "the red  door")
    assert is_correct("the red door", record, latent=True)
    assert is_correct("it is the red door", record, latent=False)
    assert not is_correct("red door", record, latent=False)


def first_tokens(student: LatentStudent, count: int, *, latent: bool) -> list[list[int]]:
    """The greedy tokens after the prompts of the first records."""
    ids_BP, mask_BP = collator().prompts([record.prompt for record in RECORDS[:3]])
    start = after_latents(student, ids_BP, mask_BP) if latent else after_prompt(ids_BP, mask_BP)
    return [row.ids for row in generate(student.lm, start, count, TextEnd(TOKENIZER, []))]


@pytest.mark.parametrize("latent", [True, False])
def test_answers_stop_at_the_end_of_sequence_token(latent: bool) -> None:
    student = tiny_student().eval()
    ids = first_tokens(student, 6, latent=latent)
    assert ids[0][2] not in ids[0][:2] + ids[1] + ids[2]
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[0][2])
    answers = answer(student, collator(), tokenizer, RECORDS[:3], 6, CPU, latent=latent)
    before = 1 + PASSES if latent else 0
    assert answers == [
        Answer(str(TOKENIZER.decode(ids[0][:2])), finished=True, forward_passes=before + 3),
        *(Answer(str(TOKENIZER.decode(row)), finished=False, forward_passes=before + 6) for row in ids[1:]),
    ]


def test_many_unfinished_answers_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with one_rank():
        warn_of_unfinished(0.09, 32)
        assert not caplog.messages
        warn_of_unfinished(0.625, 32)
    (message,) = caplog.messages
    assert message.startswith("62 % of the validation answers did not end within 32 tokens")
    assert "raise data.answer_tokens" in message


def test_mean_over_ranks_divides_totals_by_the_count() -> None:
    with one_rank():
        assert mean_over_ranks({"count": 4.0, "loss": 10.0, "accuracy": 1.0}, CPU) == {"loss": 2.5, "accuracy": 0.25}
        assert mean_over_ranks({"count": 0.0, "loss": 0.0}, CPU) == {"loss": 0.0}

"""Tests of greedy answers: generation and comparison word by word."""

from __future__ import annotations

import pytest
import torch

from data.records import Record
from student_trainer.loop.greedy_answers import answer, is_correct, mean_over_ranks
from student_trainer.model.latent import LatentStudent
from tests.support.training_parts import RECORDS, TOKENIZER, collator, one_rank, tiny_student

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


class Scripted(LatentStudent):
    """A student that always generates the given token ids."""

    def __init__(self, rows: list[list[int]]) -> None:
        student = tiny_student()
        super().__init__(student.lm, student.reasoning)
        self.rows = rows

    def generate(
        self, prompt_ids_BP: torch.Tensor, prompt_mask_BP: torch.Tensor, max_new_tokens: int, *, latent: bool
    ) -> torch.Tensor:
        return torch.tensor(self.rows)


def test_answers_stop_at_the_end_of_sequence_token() -> None:
    ids = TOKENIZER(" 12")["input_ids"]
    eos = TOKENIZER.eos_token_id
    rows = [[*ids, eos, 77, 78], [eos, *ids, 77, 78], [*ids, 77, 78, 79]]
    texts = answer(Scripted(rows), collator(), TOKENIZER, RECORDS[:3], len(rows[0]), CPU, latent=True)
    assert texts == [" 12", "", TOKENIZER.decode(rows[2])]


@pytest.mark.parametrize("latent", [True, False])
def test_answers_continue_the_training_prompts(latent: bool) -> None:
    student = tiny_student().eval()
    batch = collator()(RECORDS[:3])
    tokens = student.generate(batch.prompt_ids_BP, batch.prompt_mask_BP, 4, latent=latent)
    texts = answer(student, collator(), TOKENIZER, RECORDS[:3], 4, CPU, latent=latent)
    cut = [row[: row.index(2)] if 2 in row else row for row in tokens.tolist()]
    assert texts == [TOKENIZER.decode(row, skip_special_tokens=True) for row in cut]


def test_mean_over_ranks_divides_totals_by_the_count() -> None:
    with one_rank():
        assert mean_over_ranks({"count": 4.0, "loss": 10.0, "accuracy": 1.0}, CPU) == {"loss": 2.5, "accuracy": 0.25}
        assert mean_over_ranks({"count": 0.0, "loss": 0.0}, CPU) == {"loss": 0.0}

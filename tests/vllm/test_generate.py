"""vLLM keeps what engines promise of writing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.contract.test_generate import (
    Case,
    test_a_prompt_drawn_twice_in_a_batch_gets_the_same_text,
    test_a_stop_text_ends_the_writing_and_is_no_part_of_it,
    test_a_text_that_is_cut_off_says_so,
    test_another_seed_writes_another_text_and_greedy_writing_has_no_seed,
    test_what_is_written_does_not_depend_on_the_batch,
)
from tests.vllm.conftest import Pair

__all__ = [
    "test_a_prompt_drawn_twice_in_a_batch_gets_the_same_text",
    "test_a_stop_text_ends_the_writing_and_is_no_part_of_it",
    "test_a_text_that_is_cut_off_says_so",
    "test_another_seed_writes_another_text_and_greedy_writing_has_no_seed",
    "test_what_is_written_does_not_depend_on_the_batch",
]


@pytest.fixture
def case(pairs: Callable[[str], Pair]) -> Case:
    pair = pairs("qwen2")
    return Case(pair.vllm, pair.directory, None)

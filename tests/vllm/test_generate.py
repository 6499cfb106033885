"""Tests of the contract of generation for the vLLM engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.contract.test_generate import (
    Case,
    test_a_stop_text_ends_generation_and_is_not_part_of_the_text,
    test_a_truncated_text_has_the_finish_reason_length,
    test_equal_prompts_in_a_batch_get_the_same_text,
    test_generated_text_does_not_depend_on_the_batch,
    test_the_seed_changes_sampled_text_but_not_greedy_text,
)
from tests.vllm.conftest import Pair

__all__ = [
    "test_a_stop_text_ends_generation_and_is_not_part_of_the_text",
    "test_a_truncated_text_has_the_finish_reason_length",
    "test_equal_prompts_in_a_batch_get_the_same_text",
    "test_generated_text_does_not_depend_on_the_batch",
    "test_the_seed_changes_sampled_text_but_not_greedy_text",
]


@pytest.fixture
def case(pairs: Callable[[str], Pair]) -> Case:
    pair = pairs("qwen2")
    return Case(pair.vllm, pair.directory, None)

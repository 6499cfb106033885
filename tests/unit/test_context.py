"""Tests of the student's context length, and that no record is longer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config

from kvcore.errors import FieldError
from kvcore.models.context import check_context, context_length
from student_trainer.loop.data_survey import Split
from student_trainer.loop.student_loading import check_lengths
from tests.support.tiny_models import build_model, tiny_spec
from tests.support.training_parts import LATENTS, train_config

SMALL: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0}
CONTEXT = 60


def longrope() -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    }


def test_the_context_is_that_of_the_configuration() -> None:
    assert context_length(LlamaConfig(max_position_embeddings=128)) == (128, "max_position_embeddings")


def test_context_of_longrope_and_dynamic_rope_ends_where_frequencies_would_change() -> None:
    phi = Phi3Config(
        **SMALL, max_position_embeddings=256, original_max_position_embeddings=64, rope_parameters=longrope()
    )
    assert context_length(phi) == (64, "original_max_position_embeddings")
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    llama = LlamaConfig(max_position_embeddings=128, rope_parameters=dynamic)
    assert context_length(llama) == (128, "max_position_embeddings")
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    gemma = Gemma3TextConfig(max_position_embeddings=256)
    gemma.rope_parameters = {"full_attention": longrope(), "sliding_attention": plain}
    assert context_length(gemma) == (64, "original_max_position_embeddings")


def test_a_longer_sample_is_refused_with_both_lengths_and_the_setting() -> None:
    config = LlamaConfig(max_position_embeddings=128)
    check_context(config, 128, "data.train")
    with pytest.raises(FieldError, match=r"^data\.train: .* 129 tokens, .* at most 128 \(max_position_embeddings"):
        check_context(config, 129, "data.train")


def split(name: str, *tokens: tuple[int, int, int]) -> Split:
    """Samples of these lengths of prompt, reasoning and answer."""
    return Split(name, [], np.array(tokens))


@pytest.mark.parametrize(("mode", "fits"), [("token", (3, 52, 4)), ("latent", (3, 52, 4)), ("latent", (3, 0, 53))])
def test_every_sample_is_compared_with_the_context(mode: str, fits: tuple[int, int, int]) -> None:
    """Latents count where there are more of them than tokens of the reasoning."""
    lm, config = build_model(tiny_spec("qwen3", layers=1, max_positions=CONTEXT)), train_config(mode)
    assert fits[0] + max(fits[1], LATENTS if mode == "latent" else 0) + fits[2] + 1 == CONTEXT
    train, longer = split("training", (1, 1, 1), fits), (fits[0], fits[1], fits[2] + 1)
    check_lengths(config, lm, [train])
    with pytest.raises(FieldError, match=rf"^data\.val: the longest sample takes {CONTEXT + 1} tokens"):
        check_lengths(config, lm, [train, split("validation", longer)])
    with pytest.raises(FieldError, match=r"^data\.train"):
        check_lengths(config, lm, [split("training", (1, 1, 1), longer)])


def test_training_samples_of_a_curriculum_have_latents_and_reasoning() -> None:
    lm = build_model(tiny_spec("qwen3", layers=1, max_positions=CONTEXT))
    student, run = {"latents": 6, "latents_per_step": 2}, {"curriculum_epochs": 1.0}
    config = train_config(student=student, loss={"step_ce_weight": 0.5}, run=run)
    fits, longer = (1, CONTEXT - 7, 1), (1, CONTEXT - 6, 1)
    check_lengths(config, lm, [split("training", fits), split("validation", longer)])
    with pytest.raises(FieldError, match=rf"^data\.train: the longest sample takes {CONTEXT + 1} tokens"):
        check_lengths(config, lm, [split("training", longer)])

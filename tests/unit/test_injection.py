"""Tests of K/V injection: later tokens attend to the injected K/V, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from kvcore.types import Tensor
from student_trainer.model.capture import capture_kv
from student_trainer.model.injection import inject_kv
from tests.support.rotary_models import MODELS
from tests.support.tiny_models import FAMILIES, Family, build_model, tiny_spec

IDS_BT = torch.tensor([[5, 9, 31, 7, 12, 80, 44], [200, 3, 4, 90, 11, 6, 17]])
COLUMNS = slice(2, 5)
# True for the tokens in COLUMNS.
INSIDE_BT = torch.tensor([[False, False, True, True, True, False, False]] * 2)


def model_of(family: Family) -> PreTrainedModel:
    return build_model(tiny_spec(family)).requires_grad_(False)


def other_kv(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """The model's K/V for another text: realistic values that differ from its K/V for IDS_BT."""
    with torch.no_grad(), capture_kv(model) as capture:
        model(IDS_BT.flip(1) + 3)
    return capture.columns(1, 4)


def at_columns(k_BLHMD: Tensor, v_BLHMD: Tensor, mask_BT: Tensor = INSIDE_BT) -> tuple[Tensor, Tensor, Tensor]:
    """K/V padded to all tokens with NaN outside COLUMNS, and the mask."""
    around = (0, 0, COLUMNS.start, IDS_BT.shape[1] - COLUMNS.stop)
    k_BLHTD, v_BLHTD = (torch.nn.functional.pad(x, around, value=torch.nan) for x in (k_BLHMD, v_BLHMD))
    return k_BLHTD, v_BLHTD, mask_BT


def injected_logits(model: PreTrainedModel, injection: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    with inject_kv(model, *injection):
        return model(IDS_BT).logits


def logits_with_overwritten_cache(model: Any, row: int, k_LHMD: Tensor, v_LHMD: Tensor) -> Tensor:
    """Logits of the tokens after COLUMNS, from a cache with overwritten columns (keys rotated by hand)."""
    cache = DynamicCache()
    model(IDS_BT[row : row + 1, : COLUMNS.stop], past_key_values=cache)
    positions = torch.arange(COLUMNS.start, COLUMNS.stop)[None]
    cos, sin = model.model.rotary_emb(k_LHMD, positions)
    for layer, cached in enumerate(cache.layers):
        k_HMD = k_LHMD[layer]
        half = k_HMD.shape[-1] // 2
        half_turned = torch.cat([-k_HMD[..., half:], k_HMD[..., :half]], dim=-1)
        kept: Any = cached
        kept.keys[0, :, COLUMNS] = k_HMD * cos + half_turned * sin
        kept.values[0, :, COLUMNS] = v_LHMD[layer]
    return model(IDS_BT[row : row + 1, COLUMNS.stop :], past_key_values=cache).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_injecting_a_models_own_kv_changes_nothing(family: Family) -> None:
    model = model_of(family)
    with torch.no_grad(), capture_kv(model) as capture:
        plain = model(IDS_BT).logits
    injection = at_columns(*capture.columns(2, 5))
    torch.testing.assert_close(injected_logits(model, injection), plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_injection_equals_an_overwritten_cache_for_later_tokens(family: Family) -> None:
    model = model_of(family)
    k_BLHMD, v_BLHMD = other_kv(model)
    logits = injected_logits(model, at_columns(k_BLHMD, v_BLHMD))
    for row in range(2):
        expected = logits_with_overwritten_cache(model, row, k_BLHMD[row], v_BLHMD[row])
        torch.testing.assert_close(logits[row, COLUMNS.stop :], expected, atol=1e-5, rtol=1e-5)
    assert (logits - model(IDS_BT).logits)[:, COLUMNS.stop :].abs().max() > 1e-3
    torch.testing.assert_close(logits[:, : COLUMNS.start], model(IDS_BT).logits[:, : COLUMNS.start])


def test_masked_out_positions_keep_the_models_own_kv() -> None:
    model = model_of("qwen3")
    k_BLHMD, v_BLHMD = other_kv(model)
    mask_BT = torch.zeros_like(INSIDE_BT)
    mask_BT[0, COLUMNS.stop - 1] = True  # Own K/V before it do not depend on it.
    empty = ~mask_BT[:, None, None, COLUMNS, None]
    with torch.no_grad(), capture_kv(model) as capture:
        model(IDS_BT)
    own_k, own_v = capture.columns(2, 5)
    mixed = at_columns(torch.where(empty, own_k, k_BLHMD), torch.where(empty, own_v, v_BLHMD))
    k_leaf, v_leaf = (x.masked_fill(empty, torch.nan).requires_grad_() for x in (k_BLHMD, v_BLHMD))
    logits = injected_logits(model, at_columns(k_leaf, v_leaf, mask_BT))
    torch.testing.assert_close(logits, injected_logits(model, mixed), atol=1e-6, rtol=1e-6)
    logits.square().sum().backward()
    for leaf in (k_leaf, v_leaf):
        assert leaf.grad is not None
        assert bool((leaf.grad == 0)[empty.expand_as(leaf)].all())
        assert leaf.grad[0, :, :, 2].abs().sum() > 0


def test_the_model_is_restored_even_after_an_error() -> None:
    model = model_of("llama")
    plain = model(IDS_BT).logits
    k_BLHMD, v_BLHMD = other_kv(model)
    with pytest.raises(ZeroDivisionError), inject_kv(model, *at_columns(k_BLHMD, v_BLHMD)):
        raise ZeroDivisionError
    assert model(IDS_BT).logits.equal(plain)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_kv_can_be_injected_in_every_architecture(name: str) -> None:
    model: Any = MODELS[name]().base_model
    ids_BT = IDS_BT % int(model.config.vocab_size)
    with capture_kv(model) as capture:
        plain = model(ids_BT).last_hidden_state
    k_BLHMD, v_BLHMD = capture.columns(2, 5)
    with inject_kv(model, *at_columns(k_BLHMD, v_BLHMD)):
        torch.testing.assert_close(model(ids_BT).last_hidden_state, plain, atol=1e-5, rtol=1e-5)
    with inject_kv(model, *at_columns(k_BLHMD.flip(3), v_BLHMD.flip(3))):
        changed = (model(ids_BT).last_hidden_state - plain).abs()
    assert changed[:, : COLUMNS.start].max() == 0
    assert changed[:, COLUMNS.stop :].max() > 1e-4

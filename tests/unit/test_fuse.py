"""Tests of the fusion of several teachers' K/V into one target."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuse.fuse_kv import fuse
from kvcore.errors import FieldError

N, B, L, H, M, D = 3, 4, 2, 2, 5, 3  # axes that could be confused have different sizes
SHAPE = (N, B, L, H, M, D)
FORMS = {"one per teacher": (N,), "per sample": (B, N)}


def naive(x: np.ndarray, mask: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loops over slots; `weights` is [B,N]."""
    teachers, batch, layers, heads, slots, dims = x.shape
    fused, present = np.zeros((batch, layers, heads, slots, dims)), np.zeros((batch, slots), dtype=bool)
    for b in range(batch):
        for m in range(slots):
            weight = {n: weights[b, n] for n in range(teachers) if mask[n, b, m]}
            total = sum(weight.values())
            if total == 0:
                continue
            present[b, m] = True
            for n, value in weight.items():
                fused[b, :, :, m] += value / total * x[n, b, :, :, m]
    return fused, present


def keys_and_mask(seed: int, density: float = 0.6) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys [N,B,L,H,M,D] with NaN in the slots that the mask [N,B,M] leaves empty."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=generator)
    mask = torch.rand(N, B, M, generator=generator) < density
    return x.masked_fill(~mask[:, :, None, None, :, None], math.nan), mask


def random_weights(seed: int, form: str, zeros: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    weights = torch.rand(FORMS[form], generator=generator) + 0.01
    return weights.masked_fill(torch.rand(FORMS[form], generator=generator) < zeros, 0.0)


def check_against_naive(x: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor) -> None:
    fused, present = fuse(x, mask, weights)
    expected, expected_present = naive(
        np.nan_to_num(x.double().numpy()), mask.numpy(), weights.expand(B, N).double().numpy()
    )
    assert np.array_equal(present.numpy(), expected_present)
    np.testing.assert_allclose(fused.numpy(), expected, rtol=0, atol=2e-6)


@settings(max_examples=60)
@given(st.integers(0, 9999), st.sampled_from([0.0, 0.3, 0.7, 1.0]), st.sampled_from(sorted(FORMS)))
def test_target_is_the_weighted_mean_over_the_teachers_present(seed: int, density: float, form: str) -> None:
    x, mask = keys_and_mask(seed, density)
    check_against_naive(x, mask, random_weights(seed, form))


@settings(max_examples=60)
@given(st.integers(0, 9999), st.sampled_from([0.3, 0.6, 1.0]))
def test_a_teacher_of_weight_0_counts_as_absent(seed: int, zeros: float) -> None:
    x, mask = keys_and_mask(seed)
    check_against_naive(x, mask, random_weights(seed, "per sample", zeros))


@settings(max_examples=30)
@given(st.integers(0, 9999), st.sampled_from(sorted(FORMS)), st.permutations(range(N)))
def test_the_order_of_the_teachers_does_not_matter(seed: int, form: str, order: list[int]) -> None:
    x, mask = keys_and_mask(seed)
    weights = random_weights(seed, form, 0.0 if form == "one per teacher" else 0.3)
    fused, present = fuse(x, mask, weights)
    other, other_present = fuse(x[order], mask[order], weights[..., order])
    assert torch.equal(other_present, present)
    torch.testing.assert_close(other, fused)


def test_a_slot_filled_only_by_teachers_of_weight_0_is_masked() -> None:
    mask = torch.tensor([[[True, False]], [[True, True]]])
    fused, present = fuse(torch.ones(2, 1, 1, 1, 2, 1), mask, torch.tensor([[1.0, 0.0]]))
    assert present.tolist() == [[True, False]]
    assert fused.flatten().tolist() == [1.0, 0.0]


def test_only_the_ratio_of_weights_matters() -> None:
    x, mask = keys_and_mask(0)
    one, _ = fuse(x, mask, torch.tensor([1.0, 2.0, 4.0]))
    other, _ = fuse(x, mask, torch.tensor([0.25, 0.5, 1.0]))
    assert torch.equal(one, other)


@pytest.mark.parametrize("weights", [torch.tensor([0.3]), torch.full((B, 1), 1e-6)])
def test_a_single_teacher_is_returned_exactly_for_any_weight(weights: torch.Tensor) -> None:
    x, _ = keys_and_mask(1, 1.0)
    fused, present = fuse(x[:1], torch.ones(1, B, M, dtype=torch.bool), weights)
    assert torch.equal(fused, x[0])
    assert present.all()


def test_a_batch_without_slots_has_an_empty_target() -> None:
    fused, present = fuse(torch.zeros(N, B, L, H, 0, D), torch.zeros(N, B, 0, dtype=torch.bool), torch.ones(N))
    assert fused.shape == (B, L, H, 0, D)
    assert present.shape == (B, 0)


def test_low_precision_is_fused_in_fp32() -> None:
    x = torch.tensor([1.0, 1.0078125]).view(2, 1, 1, 1, 1, 1)
    fused, _ = fuse(x.bfloat16(), torch.ones(2, 1, 1, dtype=torch.bool), torch.tensor([1.0, 1.0]).bfloat16())
    assert fused.dtype == torch.float32
    assert fused.item() == 1.00390625  # halfway, which bfloat16 can't hold


@pytest.mark.parametrize("form", sorted(FORMS))
def test_gradients_match_finite_differences(form: str) -> None:
    x, mask = keys_and_mask(3)
    # In training, adapters also fill the empty slots. Finite differences need finite values there.
    x = torch.nan_to_num(x.double(), nan=5.0)[:, :2].requires_grad_()
    weights = random_weights(3, form).double()
    weights = (weights if form == "one per teacher" else weights[:2]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: fuse(x, mask[:, :2], w)[0], (x, weights), fast_mode=True)


@settings(max_examples=30)
@given(st.integers(0, 9999), st.sampled_from([0.0, 0.3, 0.7]), st.sampled_from(sorted(FORMS)))
def test_nan_in_empty_slots_does_not_reach_the_gradients(seed: int, density: float, form: str) -> None:
    x, mask = keys_and_mask(seed, density)
    weights = random_weights(seed, form, 0.0 if form == "one per teacher" else 0.4)
    x.requires_grad_()
    weights.requires_grad_()
    fuse(x, mask, weights)[0].square().sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    assert torch.isfinite(weights.grad).all()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[~mask[:, :, None, None, :, None].expand(SHAPE)] == 0).all()


def test_a_weight_of_0_gets_the_gradient_of_raising_it() -> None:
    x = torch.tensor([2.0, 5.0]).view(2, 1, 1, 1, 1, 1)
    weights = torch.tensor([[1.0, 0.0]], requires_grad=True)
    fuse(x, torch.ones(2, 1, 1, dtype=torch.bool), weights)[0].sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [[0.0, 3.0]]


def test_masked_slots_contribute_no_gradient() -> None:
    mask = torch.tensor([[[False]], [[True]]])
    weights = torch.tensor([[1.0, 0.0]], requires_grad=True)
    fuse(torch.ones(2, 1, 1, 1, 1, 1), mask, weights)[0].sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [[0.0, 0.0]]


def test_a_weight_near_0_counts_as_0_and_keeps_gradients_finite() -> None:
    logits = torch.tensor([[0.0, -95.0]], requires_grad=True)
    x, mask = torch.ones(2, 1, 1, 1, 2, 1), torch.tensor([[[True, False]], [[True, True]]])
    fused, present = fuse(x, mask, logits.softmax(-1))
    fused.sum().backward()
    assert present.tolist() == [[True, False]]
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    "weights",
    [
        [1.0, 2.0],
        [1.0, 0.0, 1.0],
        [1.0, -1.0, 1.0],
        [1.0, math.nan, 1.0],
        [math.inf, 1.0, 1.0],
        [[1.0, 1.0, 1.0]],
        [[1.0, 1.0, -0.1]] * B,
        [[[1.0, 1.0, 1.0]] * L] * B,
    ],
)
def test_invalid_weights_are_refused(weights: list[float]) -> None:
    x, mask = keys_and_mask(4)
    with pytest.raises(FieldError, match="weights"):
        fuse(x, mask, torch.tensor(weights))


def test_a_nan_weight_makes_only_the_target_of_its_sample_nan() -> None:
    x, mask = keys_and_mask(4)
    weights_BN = torch.ones(B, 3)
    good, _ = fuse(x, mask, weights_BN)
    weights_BN[0, 1] = math.nan
    fused, _ = fuse(x, mask, weights_BN)
    assert fused[0].isnan().all()
    assert fused[1:].equal(good[1:])

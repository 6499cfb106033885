"""Several teachers' K/V become one target."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuse.fuse_kv import fuse
from kvcore.errors import FieldError

SHAPE = (3, 4, 2, 2, 5, 3)  # N, B, L, H, M, D: no two axes that matter are equal


def naive(x: np.ndarray, mask: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    teachers, batch, layers, heads, slots, dims = x.shape
    fused, present = np.zeros((batch, layers, heads, slots, dims)), np.zeros((batch, slots), dtype=bool)
    for b in range(batch):
        for m in range(slots):
            here = [n for n in range(teachers) if mask[n, b, m]]
            present[b, m] = bool(here)
            total = sum(weights[n] for n in here)
            for n in here:
                fused[b, :, :, m] += weights[n] / total * x[n, b, :, :, m]
    return fused, present


def case(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=generator)
    mask = torch.rand(SHAPE[0], SHAPE[1], SHAPE[4], generator=generator) < 0.6
    return x, mask


@given(st.integers(0, 50), st.lists(st.floats(0.01, 50.0), min_size=3, max_size=3))
def test_fusing_is_the_weighted_mean_over_the_teachers_present(seed: int, weights: list[float]) -> None:
    x, mask = case(seed)
    fused, present = fuse(x, mask, torch.tensor(weights))
    expected, expected_present = naive(x.double().numpy(), mask.numpy(), np.array(weights))
    assert np.array_equal(present.numpy(), expected_present)
    np.testing.assert_allclose(fused.numpy(), expected, rtol=0, atol=2e-6)


def test_only_the_ratio_of_weights_matters() -> None:
    x, mask = case(0)
    one, _ = fuse(x, mask, torch.tensor([1.0, 2.0, 4.0]))
    other, _ = fuse(x, mask, torch.tensor([0.25, 0.5, 1.0]))
    assert torch.equal(one, other)


def test_a_lone_teacher_passes_through_exactly_whatever_its_weight() -> None:
    x, _ = case(1)
    mask = torch.ones(1, SHAPE[1], SHAPE[4], dtype=torch.bool)
    fused, present = fuse(x[:1], mask, torch.tensor([0.3]))
    assert torch.equal(fused, x[0])
    assert present.all()


def test_what_stands_in_an_absent_slot_is_never_read() -> None:
    x, mask = case(2)
    spoiled = x.masked_fill(~mask[:, :, None, None, :, None], math.nan)
    weights = torch.tensor([1.0, 2.0, 3.0])
    fused, present = fuse(spoiled, mask, weights)
    assert torch.equal(fused, fuse(x, mask, weights)[0])
    assert not mask.any(dim=0).all(), "the case has no slot without a teacher"
    assert (fused[(~present)[:, None, None, :, None].expand_as(fused)] == 0).all()


def test_whatever_comes_in_is_fused_in_fp32() -> None:
    x = torch.tensor([1.0, 1.0078125]).view(2, 1, 1, 1, 1, 1)
    fused, _ = fuse(x.bfloat16(), torch.ones(2, 1, 1, dtype=torch.bool), torch.tensor([1.0, 1.0]))
    assert fused.dtype == torch.float32
    assert fused.item() == 1.00390625  # halfway, which bfloat16 can't hold


def test_gradients_reach_each_teacher_by_its_share() -> None:
    x, mask = case(3)
    x.requires_grad_()
    weights = torch.tensor([1.0, 2.0, 5.0])
    fuse(x, mask, weights)[0].sum().backward()
    present = mask * weights[:, None, None]
    share = torch.nan_to_num(present / present.sum(dim=0))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, share[:, :, None, None, :, None].expand(SHAPE))


@pytest.mark.parametrize(
    "weights", [[1.0, 2.0], [1.0, 0.0, 1.0], [1.0, -1.0, 1.0], [1.0, math.nan, 1.0], [math.inf, 1.0, 1.0]]
)
def test_bad_weights_are_refused(weights: list[float]) -> None:
    x, mask = case(4)
    with pytest.raises(FieldError, match="weights"):
        fuse(x, mask, torch.tensor(weights))

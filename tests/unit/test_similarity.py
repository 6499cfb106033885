"""Tests of the similarity metrics between the teachers' K/V and the student's own."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuse.similarity import Metric, teacher_similarity
from kvcore.errors import FieldError

N, B, L, H, M, D = 3, 4, 2, 5, 6, 7
METRICS: tuple[Metric, ...] = get_args(Metric)


def naive(student: np.ndarray, teacher: np.ndarray, mask: np.ndarray, metric: str) -> np.ndarray:
    """Similarity with `mask` [N,B,L,H,M], computed feature by feature."""
    teachers, batch, layers, heads, slots, dims = student.shape
    out = np.zeros((batch, teachers))
    for n in range(teachers):
        for b in range(batch):
            for layer in range(layers):
                dot = own = theirs = apart = 0.0
                count = 0
                for h in range(heads):
                    for m in range(slots):
                        if not mask[n, b, layer, h, m]:
                            continue
                        for d in range(dims):
                            x, y = float(student[n, b, layer, h, m, d]), float(teacher[n, b, layer, h, m, d])
                            dot, own, theirs = dot + x * y, own + x * x, theirs + y * y
                            apart, count = apart + (x - y) ** 2, count + 1
                if count == 0:
                    continue
                value = {"dot": dot / count, "euclidean": -apart / count}
                out[b, n] += (value[metric] if metric in value else dot / math.sqrt(own * theirs)) / layers
    return out


def case(seed: int, density: float, *, per_head: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Correlated student and teacher K/V, with NaN in the empty slots."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(N, B, L, H, M, D, generator=generator)
    teacher = student * torch.linspace(-1, 1, N).view(N, 1, 1, 1, 1, 1)
    teacher = teacher + torch.randn(student.shape, generator=generator)
    mask = torch.rand((N, B, L, H, M) if per_head else (N, B, M), generator=generator) < density
    empty = ~full(mask)[..., None]
    return student.masked_fill(empty, math.nan), teacher.masked_fill(empty, math.nan), mask


def full(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dim() == 5 else mask[:, :, None, None].expand(N, B, L, H, M)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("per_head", [False, True])
@settings(max_examples=6)
@given(st.integers(0, 9999), st.sampled_from([0.0, 0.1, 0.6, 1.0]))
def test_similarity_uses_only_slots_that_both_have(metric: Metric, per_head: bool, seed: int, density: float) -> None:
    student, teacher, mask = case(seed, density, per_head=per_head)
    sim = teacher_similarity(student, teacher, mask, metric)
    assert sim.shape == (B, N)
    expected = naive(student.numpy(), teacher.numpy(), full(mask).numpy(), metric)
    np.testing.assert_allclose(sim.numpy(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_permuting_the_teachers_permutes_the_similarities(metric: Metric) -> None:
    student, teacher, mask = case(1, 0.5, per_head=False)
    order = [2, 0, 1]
    permuted = teacher_similarity(student[order], teacher[order], mask[order], metric)
    assert torch.equal(permuted, teacher_similarity(student, teacher, mask, metric)[..., order])


def test_the_students_own_cache_has_the_maximum_similarity() -> None:
    student, _, mask = case(2, 1.0, per_head=False)
    best = {metric: teacher_similarity(student, student, mask, metric) for metric in METRICS}
    torch.testing.assert_close(best["cosine"], torch.ones(B, N))
    torch.testing.assert_close(best["dot"], student.square().mean(dim=(2, 3, 4, 5)).T)
    assert (best["euclidean"] == 0).all()


def test_only_cosine_is_invariant_to_scale() -> None:
    student, teacher, mask = case(3, 1.0, per_head=False)
    once = {metric: teacher_similarity(student, teacher, mask, metric) for metric in METRICS}
    twice = {metric: teacher_similarity(student, 2 * teacher, mask, metric) for metric in METRICS}
    torch.testing.assert_close(twice["cosine"], once["cosine"])
    torch.testing.assert_close(twice["dot"], 2 * once["dot"])
    assert (twice["euclidean"] < once["euclidean"]).all()


def test_low_precision_kv_are_compared_in_fp32() -> None:
    x = torch.full((1, 1, 1, 1, 1024, 1), 1.0078125, dtype=torch.bfloat16)
    sim = teacher_similarity(x, x, torch.ones(1, 1, 1024, dtype=torch.bool), "dot")
    assert sim.dtype == torch.float32
    assert sim.item() == pytest.approx(1.0078125**2, rel=1e-6)


def test_zero_cache_has_zero_cosine_similarity_and_a_finite_gradient() -> None:
    student = torch.zeros(1, 1, 1, 1, 2, 2, requires_grad=True)
    teacher = torch.ones(1, 1, 1, 1, 2, 2)
    sim = teacher_similarity(student, teacher, torch.ones(1, 1, 2, dtype=torch.bool), "cosine")
    sim.sum().backward()
    assert sim.item() == 0
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_match_the_formula_and_are_finite(metric: Metric) -> None:
    student, teacher, mask = case(4, 0.5, per_head=False)
    mask[:, 0] = False  # a sample that no teacher has
    student, teacher = (x[:, :2, :1, :2, :3, :2].double() for x in (student, teacher))
    mask = mask[:, :2, :3]
    teacher.requires_grad_()
    teacher_similarity(student, teacher, mask, metric).sum().backward()
    assert teacher.grad is not None
    assert torch.isfinite(teacher.grad).all()
    filled = torch.nan_to_num(teacher.detach(), nan=3.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: teacher_similarity(student, x, mask, metric), (filled,), fast_mode=True)


def test_an_unknown_metric_is_refused() -> None:
    student, teacher, mask = case(5, 1.0, per_head=False)
    with pytest.raises(FieldError, match=r"fuse\.metric: .*'manhattan'"):
        teacher_similarity(student, teacher, mask, "manhattan")  # pyright: ignore[reportArgumentType]

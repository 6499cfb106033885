"""Tests of routing weights: softmax over the present teachers, top-1, temperature, entropy and collapse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuse.routing import Choose, CollapseDetector, entropy, temperature, to_weights
from kvcore.errors import FieldError

B = 5


def naive_weights(logits: np.ndarray, present: np.ndarray, tau: float, choose: str) -> np.ndarray:
    """`logits` [B,N]."""
    out = np.zeros(logits.shape)
    for b in range(len(logits)):
        here = [n for n in range(logits.shape[1]) if present[b, n]]
        if not here:
            continue
        best = here[0]
        for n in here:
            best = n if logits[b, n] > logits[b, best] else best
        if choose == "top1":
            out[b, best] = 1.0
            continue
        power = {n: math.exp((float(logits[b, n]) - float(logits[b, best])) / tau) for n in here}
        for n in here:
            out[b, n] = power[n] / sum(power.values())
    return out


def naive_entropy(weights: np.ndarray, present: np.ndarray) -> float:
    """`weights` [B,N]."""
    rows = [-sum(float(w) * math.log(float(w)) for w in row if w > 0) for row in weights[present.any(axis=1)]]
    return sum(rows) / len(rows) if rows else 0.0


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B,N] with NaN for absent teachers, and the mask of present teachers in any pattern."""
    teachers = draw(st.integers(1, 4))
    row = st.lists(st.booleans(), min_size=teachers, max_size=teachers)
    present = torch.tensor(draw(st.lists(row, min_size=B, max_size=B)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    logits = torch.randn(B, teachers, generator=generator) * draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))
    return logits.masked_fill(~present, math.nan), present


@settings(max_examples=60)
@given(cases(), st.sampled_from([0.1, 0.5, 1.0, 3.0]), st.sampled_from(["soft", "top1"]))
def test_weights_are_a_softmax_over_the_present_teachers(
    case: tuple[torch.Tensor, torch.Tensor], tau: float, choose: Choose
) -> None:
    logits, present = case
    weights = to_weights(logits, present, tau, choose)
    assert weights.shape == logits.shape
    expected = naive_weights(logits.double().numpy(), present.numpy(), tau, choose)
    np.testing.assert_allclose(weights.double().numpy(), expected, rtol=1e-4, atol=1e-6)
    assert (weights[~present] == 0).all()


@settings(max_examples=40)
@given(cases(), st.sampled_from(["soft", "top1"]))
def test_logits_of_absent_teachers_get_no_gradient(case: tuple[torch.Tensor, torch.Tensor], choose: Choose) -> None:
    logits, present = case
    logits.requires_grad_()
    weights = to_weights(logits, present, 0.5, choose)
    steps = torch.arange(1.0, logits.numel() + 1).view(logits.shape)
    (weights * steps).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[~present] == 0).all()


def test_gradients_match_finite_differences() -> None:
    logits = torch.randn(B, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    present = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0], [0, 1, 1]]).bool()
    assert torch.autograd.gradcheck(lambda x: to_weights(x, present, 0.7), (logits,))
    assert torch.autograd.gradcheck(lambda x: entropy(to_weights(x, present, 0.7), present), (logits,))


@settings(max_examples=40)
@given(cases())
def test_top1_is_exactly_one_hot_with_the_gradient_of_the_soft_weights(
    case: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits, present = case
    steps = torch.arange(1.0, logits.numel() + 1).view(logits.shape)

    def gradient(choose: Choose) -> torch.Tensor:
        own = logits.clone().requires_grad_()
        return torch.autograd.grad((to_weights(own, present, 0.5, choose) * steps).sum(), own)[0]

    weights = to_weights(logits, present, 0.5, "top1")
    assert set(weights.flatten().tolist()) <= {0.0, 1.0}
    assert torch.equal(weights.sum(dim=-1), present.any(dim=-1).float())
    assert torch.equal(gradient("top1"), gradient("soft"))


@pytest.mark.parametrize("choose", ["soft", "top1"])
def test_permuting_the_teachers_permutes_the_weights(choose: Choose) -> None:
    logits = torch.randn(B, 4, generator=torch.Generator().manual_seed(1))
    present = torch.rand(B, 4, generator=torch.Generator().manual_seed(2)) < 0.6
    order = [3, 1, 0, 2]
    permuted = to_weights(logits[..., order], present[:, order], 0.5, choose)
    torch.testing.assert_close(permuted, to_weights(logits, present, 0.5, choose)[..., order])


def test_equal_logits_give_exactly_equal_weights() -> None:
    present = torch.tensor([[True, True, True, True], [True, False, True, False]])
    weights = to_weights(torch.zeros(2, 4), present, 0.5)
    assert weights.tolist() == [[0.25] * 4, [0.5, 0.0, 0.5, 0.0]]


def test_low_precision_logits_give_fp32_weights() -> None:
    assert to_weights(torch.zeros(1, 3).bfloat16(), torch.ones(1, 3, dtype=torch.bool), 1.0).dtype == torch.float32


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan])
def test_non_positive_temperature_is_refused(tau: float) -> None:
    with pytest.raises(FieldError, match=r"fuse\.temperature: must be above 0"):
        to_weights(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), tau)


def test_unknown_choice_is_refused() -> None:
    with pytest.raises(FieldError, match=r"fuse\.choose: .*'top2'"):
        to_weights(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), 1.0, "top2")  # pyright: ignore[reportArgumentType]


def test_temperature_decays_per_epoch_to_its_floor() -> None:
    schedule = [temperature(epoch, start=1.0, decay=0.1, floor=0.5) for epoch in range(8)]
    assert schedule == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.5])
    assert temperature(2.5, start=2.0, decay=0.4, floor=0.5) == pytest.approx(1.0)
    assert temperature(100, start=3.0, decay=0.0, floor=0.5) == 3.0


@settings(max_examples=60)
@given(cases(), st.sampled_from([0.5, 2.0]))
def test_entropy_is_the_mean_in_nats_over_the_samples_with_a_teacher(
    case: tuple[torch.Tensor, torch.Tensor], tau: float
) -> None:
    logits, present = case
    weights = to_weights(logits, present, tau)
    expected = naive_entropy(weights.double().numpy(), present.numpy())
    assert entropy(weights, present).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("teachers", [1, 2, 3, 7])
def test_equal_weights_have_the_entropy_log_n(teachers: int) -> None:
    present = torch.ones(B, teachers, dtype=torch.bool)
    weights = to_weights(torch.zeros(B, teachers), present, 1.0)
    assert entropy(weights, present).item() == pytest.approx(math.log(teachers), abs=1e-6)


def test_entropy_ignores_samples_without_a_teacher() -> None:
    present = torch.tensor([[True, True], [False, False], [False, False]])
    weights = to_weights(torch.zeros(3, 2), present, 1.0)
    assert entropy(weights, present).item() == pytest.approx(math.log(2))
    assert entropy(weights[1:], present[1:]).item() == 0


def test_entropy_of_saturated_weights_has_a_finite_gradient() -> None:
    logits = torch.tensor([[0.0, 1000.0], [0.0, -1000.0]], requires_grad=True)
    present = torch.ones(2, 2, dtype=torch.bool)
    weights = to_weights(logits, present, 0.5)
    assert (weights == 0).any()
    entropy(weights, present).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_maximising_entropy_equalises_the_weights() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]], requires_grad=True)
    present = torch.ones(1, 3, dtype=torch.bool)
    before = entropy(to_weights(logits, present, 1.0), present)
    before.backward()
    assert logits.grad is not None
    after = entropy(to_weights(logits + 0.1 * logits.grad, present, 1.0), present)
    assert after > before


def test_collapse_is_reported_once_with_teacher_weight_and_remedies() -> None:
    detector = CollapseDetector(["math", "code"])
    assert detector.check([0.5, 0.5]) is None
    assert detector.check([0.05, 0.95]) is None  # at the limit, not above it
    warning = detector.check(torch.tensor([0.03, 0.97]))
    assert warning is not None
    for word in ("'code'", "0.970", "0.95", "fuse.entropy_weight", "0.05", "fuse.temperature_floor"):
        assert word in warning
    for word in ("optim.lr", "alignment"):
        assert word in warning
    assert detector.check([0.01, 0.99]) is None


def test_collapse_is_reported_again_after_recovery_or_for_another_teacher() -> None:
    detector = CollapseDetector(["math", "code"])
    assert "'math'" in (detector.check([0.99, 0.01]) or "")
    assert "'code'" in (detector.check([0.01, 0.99]) or "")
    assert detector.check([0.6, 0.4]) is None
    assert "'code'" in (detector.check([0.01, 0.99]) or "")


def test_single_teacher_is_not_a_collapse() -> None:
    assert CollapseDetector(["math"]).check([1.0]) is None

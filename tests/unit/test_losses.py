"""Tests of the means over tokens and of the loss on hidden states, compared with loops over elements in fp64."""

from __future__ import annotations

import statistics

import pytest
import torch

from kvcore.types import Tensor
from student_trainer.model.losses import codi_loss, mean_over_tokens

BATCH, TOKENS, STATES, WIDTH = 4, 5, 3, 6
# One sample each: full, padded, with a gap, and with a single token.
MASK_BT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 1], [0, 0, 1, 0, 0]], dtype=torch.bool)


def token_losses(seed: int) -> Tensor:
    return 3 * torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(seed))


def hidden(seed: int) -> Tensor:
    """Hidden states whose scale differs per layer and whose offset differs per sample."""
    generator = torch.Generator().manual_seed(seed)
    x_BSE = torch.randn(BATCH, STATES, WIDTH, generator=generator, dtype=torch.float64)
    return x_BSE * torch.tensor([0.3, 1.0, 9.0])[:, None] + torch.arange(BATCH)[:, None, None]


def test_mean_over_tokens_averages_within_a_sample_first() -> None:
    loss_BT = token_losses(3)
    samples = [statistics.mean(float(loss_BT[b, t]) for t in range(TOKENS) if MASK_BT[b, t]) for b in range(BATCH)]
    assert float(mean_over_tokens(loss_BT, MASK_BT)) == pytest.approx(statistics.mean(samples), rel=1e-6)


def test_a_sample_without_tokens_adds_zero_to_the_mean() -> None:
    mask_BT = MASK_BT.clone()
    mask_BT[1] = False
    loss_BT = token_losses(3)
    expected = mean_over_tokens(loss_BT[[0, 2, 3]], MASK_BT[[0, 2, 3]]) * 3 / 4
    torch.testing.assert_close(mean_over_tokens(loss_BT, mask_BT), expected)


def test_mean_loss_of_two_half_batches_equals_that_of_the_batch() -> None:
    loss_BT = token_losses(3).requires_grad_()

    def loss(rows: slice) -> Tensor:
        return mean_over_tokens(loss_BT[rows], MASK_BT[rows])

    whole, halves = loss(slice(None)), (loss(slice(0, 2)) + loss(slice(2, 4))) / 2
    torch.testing.assert_close(halves, whole)
    torch.testing.assert_close(torch.autograd.grad(halves, loss_BT), torch.autograd.grad(whole, loss_BT))


def naive_codi(student: Tensor, teacher: Tensor) -> float:
    layers: list[float] = []
    for s in range(STATES):
        elements: list[float] = []
        for b in range(BATCH):
            for x, y in zip(student[b, s].tolist(), teacher[b, s].tolist(), strict=True):
                difference = abs(x - y)
                elements.append(0.5 * difference**2 if difference < 1 else difference - 0.5)
        deviation = statistics.stdev(y for b in range(BATCH) for y in teacher[b, s].tolist())
        layers.append(sum(elements) / len(elements) / deviation)
    return sum(layers) / len(layers)


def test_codi_divides_the_loss_per_layer_by_the_std_of_the_teacher_states() -> None:
    student, teacher = hidden(1), hidden(2)
    assert float(codi_loss(student, teacher)) == pytest.approx(naive_codi(student, teacher), rel=1e-12)


def test_codi_gradient_matches_finite_differences_and_teacher_has_none() -> None:
    student, teacher = hidden(1).requires_grad_(), hidden(2).requires_grad_()
    codi_loss(student, teacher).backward()
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda x: codi_loss(x, hidden(2)), (student,), fast_mode=True)


def test_codi_of_half_precision_states_is_computed_in_fp32() -> None:
    student, teacher = hidden(1).bfloat16(), hidden(2).bfloat16()
    loss = codi_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss == codi_loss(student.float(), teacher.float())

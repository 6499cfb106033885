"""The losses against loops over elements in double precision."""

from __future__ import annotations

import math

import pytest
import torch

from kvcore.types import Tensor
from student_trainer.losses import cross_entropy, kv_distance, normalised_error

BATCH, LAYERS, HEADS, SLOTS, DIM = 4, 3, 2, 5, 4
# Full, ragged, with a gap, and without any target.
MASK_BM = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
SCALE_L = torch.tensor([0.5, 2.0, 7.0])


def kv(seed: int) -> Tensor:
    return 2 * torch.randn(BATCH, LAYERS, HEADS, SLOTS, DIM, generator=torch.Generator().manual_seed(seed))


def element_loss(difference: float, kind: str) -> float:
    if kind == "mse":
        return difference**2
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def naive_distance(a: Tensor, b: Tensor, scale: list[float], mask_BM: Tensor, kind: str) -> float:
    samples: list[float] = []
    for s in range(len(a)):
        slots: list[float] = []
        for m in range(a.shape[3]):
            if mask_BM[s, m]:
                elements = [
                    element_loss((float(a[s, layer, h, m, d]) - float(b[s, layer, h, m, d])) / scale[layer], kind)
                    for layer in range(a.shape[1])
                    for h in range(a.shape[2])
                    for d in range(a.shape[4])
                ]
                slots.append(sum(elements) / len(elements))
        if slots:
            samples.append(sum(slots) / len(slots))
    return sum(samples) / len(samples)


@pytest.mark.parametrize("kind", ["mse", "smooth_l1"])
def test_the_kv_objective_is_scaled_by_layer_and_averaged_by_sample(kind: str) -> None:
    expected = naive_distance(kv(1), kv(2), SCALE_L.tolist(), MASK_BM, kind)
    assert float(kv_distance(kv(1), kv(2), SCALE_L, MASK_BM, kind)) == pytest.approx(expected, rel=1e-5)


def test_the_reported_error_is_squared_over_the_targets_variance_by_layer() -> None:
    expected = naive_distance(kv(1), kv(2), SCALE_L.sqrt().tolist(), MASK_BM, "mse")
    assert float(normalised_error(kv(1), kv(2), SCALE_L, MASK_BM)) == pytest.approx(expected, rel=1e-5)


def test_masked_slots_reach_neither_the_loss_nor_the_gradient() -> None:
    student, other = kv(1).requires_grad_(), kv(2)
    hidden = ~MASK_BM[:, None, None, :, None].expand_as(other)
    changed = torch.where(hidden, torch.full_like(other, 1e6), other)
    loss = kv_distance(student, other, SCALE_L, MASK_BM, "mse")
    assert kv_distance(student, changed, SCALE_L, MASK_BM, "mse") == loss
    assert normalised_error(student, changed, SCALE_L, MASK_BM) == normalised_error(student, other, SCALE_L, MASK_BM)
    loss.backward()
    assert student.grad is not None
    assert (student.grad[hidden] == 0).all()
    assert (student.grad[~hidden] != 0).all()


def test_samples_without_a_target_do_not_thin_the_mean() -> None:
    everyone = kv_distance(kv(1), kv(2), SCALE_L, MASK_BM, "smooth_l1")
    with_target = kv_distance(kv(1)[:3], kv(2)[:3], SCALE_L, MASK_BM[:3], "smooth_l1")
    assert everyone == pytest.approx(float(with_target), rel=1e-6)


def test_a_batch_without_any_target_gives_zero_that_can_be_differentiated() -> None:
    student = kv(1).requires_grad_()
    loss = kv_distance(student, kv(2), SCALE_L, torch.zeros_like(MASK_BM), "mse")
    assert float(loss.detach()) == 0
    loss.backward()
    assert student.grad is not None
    assert (student.grad == 0).all()
    assert float(normalised_error(student, kv(2), SCALE_L, torch.zeros_like(MASK_BM))) == 0


def test_predicting_each_features_mean_scores_one() -> None:
    generator = torch.Generator().manual_seed(5)
    feature_scale = 1 + 4 * torch.rand(LAYERS, HEADS, 1, DIM, generator=generator)
    target = 3 + feature_scale * torch.randn(64, LAYERS, HEADS, SLOTS, DIM, generator=generator)
    mask_BM = torch.ones(64, SLOTS, dtype=torch.bool)
    mean = target.mean(dim=(0, 3), keepdim=True)
    variance_L = (target - mean).square().mean(dim=(0, 2, 3, 4))
    assert float(normalised_error(mean.expand_as(target), target, variance_L, mask_BM)) == pytest.approx(1.0, rel=1e-5)
    assert float(normalised_error(target, target, variance_L, mask_BM)) == 0


def text(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(BATCH, SLOTS, 7, generator=generator), torch.randint(7, (BATCH, SLOTS), generator=generator)


def test_cross_entropy_averages_inside_a_sample_first() -> None:
    logits, targets = text(3)
    mask = MASK_BM.clone()
    mask[3, 2] = True
    samples: list[float] = []
    for b in range(BATCH):
        tokens = [
            math.log(sum(math.exp(x) for x in logits[b, t].tolist())) - float(logits[b, t, targets[b, t]])
            for t in range(SLOTS)
            if mask[b, t]
        ]
        samples.append(sum(tokens) / len(tokens))
    assert float(cross_entropy(logits, targets, mask)) == pytest.approx(sum(samples) / BATCH, rel=1e-5)


def test_cross_entropy_is_computed_in_single_precision_from_half() -> None:
    logits, targets = text(3)
    halved = logits.bfloat16()
    loss = cross_entropy(halved, targets, MASK_BM)
    assert loss.dtype == torch.float32
    assert loss == cross_entropy(halved.float(), targets, MASK_BM)


def test_two_halves_of_a_batch_have_the_mean_and_gradient_of_the_whole() -> None:
    mask_BM = MASK_BM.clone()
    mask_BM[3, 0] = True
    student, (logits, targets) = kv(1).requires_grad_(), text(3)
    logits.requires_grad_()

    def loss(rows: slice) -> Tensor:
        distance = kv_distance(student[rows], kv(2)[rows], SCALE_L, mask_BM[rows], "smooth_l1")
        return distance + cross_entropy(logits[rows], targets[rows], mask_BM[rows])

    def gradients(of: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(of, (student, logits))

    whole = loss(slice(None))
    halves = (loss(slice(0, 2)) + loss(slice(2, 4))) / 2
    torch.testing.assert_close(halves, whole)
    torch.testing.assert_close(gradients(halves), gradients(whole))

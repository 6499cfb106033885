"""Tests of the KV objective and the reported errors, compared with loops over elements in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcore.types import Tensor
from student_trainer.model.losses import error_by_layer_and_head, error_by_slot, kv_distance

BATCH, LAYERS, HEADS, SLOTS, DIM = 4, 3, 2, 5, 4
KINDS = ("mse", "smooth_l1", "cosine", "cka")
PER_SLOT = KINDS[:3]
# One sample each: full, padded, with a gap, and without a target.
MASK_BM = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
HIDDEN = ~MASK_BM[:, None, None, :, None].expand(-1, LAYERS, HEADS, -1, DIM)
SCALE_L = torch.tensor([0.5, 2.0, 7.0])


def kv(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(BATCH, LAYERS, HEADS, SLOTS, DIM, generator=generator, dtype=torch.float64).to(dtype)


def with_nan(x_BLHMD: Tensor) -> Tensor:
    return x_BLHMD.masked_fill(HIDDEN, math.nan)


# ---------------------------------------------------------------------------------------------------- references
Vector = list[float]


def vector_loss(a: Vector, b: Vector, scale: float, kind: str) -> float:
    """Loss of one head's vector in one slot."""
    if kind == "cosine":
        lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
        return 1 - (sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0)
    total = 0.0
    for x, y in zip(a, b, strict=True):
        difference = abs(x - y) / scale
        if kind == "mse":
            total += difference**2
        else:
            total += 0.5 * difference**2 if difference < 1 else difference - 0.5
    return total / len(a)


def naive_head(a: Tensor, b: Tensor, mask_BM: Tensor, scale: float, kind: str) -> float:
    """Mean over samples of the mean over slots, for one head of one layer: a and b are [B,M,D]."""
    samples: list[float] = []
    for s in range(len(a)):
        slots = [
            vector_loss(a[s, m].tolist(), b[s, m].tolist(), scale, kind) for m in range(a.shape[1]) if mask_BM[s, m]
        ]
        if slots:
            samples.append(sum(slots) / len(slots))
    return sum(samples) / len(samples) if samples else 0.0


def centred(x: Tensor, mask_BM: Tensor, layer: int) -> list[Vector]:
    """Centred feature columns of a layer over all unmasked slots."""
    columns: list[Vector] = []
    for h in range(x.shape[2]):
        for d in range(x.shape[4]):
            column = [
                float(x[s, layer, h, m, d]) for s in range(len(x)) for m in range(x.shape[3]) if bool(mask_BM[s, m])
            ]
            columns.append([value - sum(column) / len(column) for value in column])
    return columns


def squared_products(a: list[Vector], b: list[Vector]) -> float:
    return sum(sum(x * y for x, y in zip(column, other, strict=True)) ** 2 for column in a for other in b)


def naive_cka(a: Tensor, b: Tensor, mask_BM: Tensor, layer: int) -> float:
    x, y = centred(a, mask_BM, layer), centred(b, mask_BM, layer)
    lengths = math.sqrt(squared_products(x, x)) * math.sqrt(squared_products(y, y))
    return 1 - squared_products(x, y) / lengths if lengths else 0.0


def naive_distance(a: Tensor, b: Tensor, scale: Vector, mask_BM: Tensor, kind: str) -> float:
    layers = range(a.shape[1])
    if kind == "cka":
        return sum(naive_cka(a, b, mask_BM, layer) for layer in layers) / len(layers)
    parts = [
        naive_head(a[:, layer, head], b[:, layer, head], mask_BM, scale[layer], kind)
        for layer in layers
        for head in range(a.shape[2])
    ]
    return sum(parts) / len(parts)


# ---------------------------------------------------------------------------------------------------- the objective
@pytest.mark.parametrize("kind", KINDS)
def test_the_kv_objective_is_scaled_per_layer_and_averaged_over_samples(kind: str) -> None:
    expected = naive_distance(kv(1), kv(2), SCALE_L.tolist(), MASK_BM, kind)
    assert float(kv_distance(kv(1), kv(2), SCALE_L, MASK_BM, kind)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [2, 3, 7, 8, 10])
def test_cka_matches_with_fewer_and_more_slots_than_features(rows: int) -> None:
    """With fewer slots than the 8 features, CKA is computed from Gram matrices over slots."""
    mask_BM = MASK_BM & (MASK_BM.flatten().cumsum(0).view_as(MASK_BM) <= rows)
    assert int(mask_BM.sum()) == rows
    a, b = kv(1, torch.float64), kv(1, torch.float64) + kv(2, torch.float64)
    expected = naive_distance(a, b, SCALE_L.tolist(), mask_BM, "cka")
    assert float(kv_distance(a, b, SCALE_L.double(), mask_BM, "cka")) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("samples", "slots", "dim"), [(2, 2, 64), (4, 100, 2)])
def test_cka_allocates_nothing_larger_than_the_kv(samples: int, slots: int, dim: int) -> None:
    student = torch.randn(samples, 1, 2, slots, dim, requires_grad=True)
    kept: list[int] = []

    def note(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        kv_distance(student, student + 1, torch.ones(1), torch.ones(samples, slots, dtype=torch.bool), "cka")
    assert max(kept) == student.numel()


@st.composite
def small_kv(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """K/V of few small integers, so that equal slots, zero vectors and constant features are common."""
    batch, layers, heads, slots, dim = (draw(st.integers(1, most)) for most in (3, 2, 2, 3, 3))
    shape = (batch, layers, heads, slots, dim)
    elements = st.lists(st.integers(-2, 2), min_size=math.prod(shape), max_size=math.prod(shape))
    a, b = (torch.tensor(draw(elements), dtype=torch.float64).view(shape) for _ in range(2))
    mask = draw(st.lists(st.booleans(), min_size=batch * slots, max_size=batch * slots))
    return a, b, torch.tensor(mask).view(batch, slots)


@given(small_kv(), st.sampled_from(KINDS))
def test_any_values_and_masks_match_the_naive_loops(values: tuple[Tensor, Tensor, Tensor], kind: str) -> None:
    a, b, mask_BM = values
    student = a.clone().requires_grad_()
    scale_L = torch.tensor([0.5, 2.0], dtype=torch.float64)[: a.shape[1]]
    loss = kv_distance(student, b, scale_L, mask_BM, kind)
    assert float(loss.detach()) == pytest.approx(naive_distance(a, b, scale_L.tolist(), mask_BM, kind), abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [2, 4])
def test_gradients_match_finite_differences(kind: str, samples: int) -> None:
    student = with_nan(kv(1, torch.float64))[:samples].requires_grad_()
    target, mask_BM, scale_L = with_nan(kv(2, torch.float64))[:samples], MASK_BM[:samples], SCALE_L.double()
    assert torch.autograd.gradcheck(
        lambda x: kv_distance(x, target, scale_L, mask_BM, kind), (student,), fast_mode=True
    )


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_masked_slots_does_not_change_loss_or_gradient(kind: str) -> None:
    clean, empty = kv(1).requires_grad_(), with_nan(kv(1)).requires_grad_()
    loss, from_empty = (
        kv_distance(clean, kv(2), SCALE_L, MASK_BM, kind),
        kv_distance(empty, with_nan(kv(2)), SCALE_L, MASK_BM, kind),
    )
    assert from_empty == loss
    for student, of in ((clean, loss), (empty, from_empty)):
        (gradient,) = torch.autograd.grad(of, student)
        assert (gradient[HIDDEN] == 0).all()
        assert (gradient[~HIDDEN] != 0).all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_gets_no_gradient(kind: str) -> None:
    student, target = kv(1).requires_grad_(), kv(2).requires_grad_()
    kv_distance(student, target, SCALE_L, MASK_BM, kind).backward()
    assert target.grad is None


@pytest.mark.parametrize("kind", PER_SLOT)
def test_samples_without_a_target_are_left_out_of_the_mean(kind: str) -> None:
    all_samples = kv_distance(kv(1), kv(2), SCALE_L, MASK_BM, kind)
    with_target = kv_distance(kv(1)[:3], kv(2)[:3], SCALE_L, MASK_BM[:3], kind)
    assert all_samples == pytest.approx(float(with_target), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_any_target_has_a_differentiable_loss_of_zero(kind: str) -> None:
    student = kv(1).requires_grad_()
    loss = kv_distance(student, kv(2), SCALE_L, torch.zeros_like(MASK_BM), kind)
    assert float(loss.detach()) == 0
    loss.backward()
    assert student.grad is not None
    assert (student.grad == 0).all()


@pytest.mark.parametrize("kind", PER_SLOT)
def test_mean_loss_of_two_half_batches_equals_that_of_the_batch(kind: str) -> None:
    mask_BM = MASK_BM.clone()
    mask_BM[3, 0] = True
    student = kv(1).requires_grad_()

    def loss(rows: slice) -> Tensor:
        return kv_distance(student[rows], kv(2)[rows], SCALE_L, mask_BM[rows], kind)

    whole, halves = loss(slice(None)), (loss(slice(0, 2)) + loss(slice(2, 4))) / 2
    torch.testing.assert_close(halves, whole)
    torch.testing.assert_close(torch.autograd.grad(halves, student), torch.autograd.grad(whole, student))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_compared_in_fp32(kind: str) -> None:
    student, target = kv(1).bfloat16(), kv(2).bfloat16()
    loss = kv_distance(student, target, SCALE_L, MASK_BM, kind)
    assert loss.dtype == torch.float32
    assert loss == kv_distance(student.float(), target.float(), SCALE_L, MASK_BM, kind)


def test_cosine_depends_only_on_direction_and_is_zero_for_a_zero_vector() -> None:
    lengths = 0.1 + torch.rand(BATCH, LAYERS, HEADS, SLOTS, 1, generator=torch.Generator().manual_seed(4))
    longer = (kv(2) * lengths).requires_grad_()
    assert float(kv_distance(longer, kv(2), SCALE_L, MASK_BM, "cosine").detach()) == pytest.approx(0, abs=1e-6)
    assert float(kv_distance(-longer, kv(2), SCALE_L, MASK_BM, "cosine").detach()) == pytest.approx(2)
    nothing = torch.zeros_like(longer, requires_grad=True)
    loss = kv_distance(nothing, kv(2), SCALE_L, MASK_BM, "cosine")
    assert float(loss.detach()) == 1
    assert (torch.autograd.grad(loss, nothing)[0] == 0).all()


def test_cka_is_invariant_to_rotation_scale_and_offset() -> None:
    features = HEADS * DIM
    turn, _ = torch.linalg.qr(torch.randn(features, features, generator=torch.Generator().manual_seed(6)))
    flat = kv(2).transpose(2, 3).flatten(3) @ turn
    rotated = (3 * flat + 5).view(BATCH, LAYERS, SLOTS, HEADS, DIM).transpose(2, 3)
    assert float(kv_distance(rotated, kv(2), SCALE_L, MASK_BM, "cka")) == pytest.approx(0, abs=1e-5)
    assert float(kv_distance(rotated, kv(1), SCALE_L, MASK_BM, "cka")) > 0.1


@pytest.mark.parametrize("side", ["student", "target"])
def test_a_constant_layer_has_zero_cka_loss_and_gradient(side: str) -> None:
    """The rounded mean of equal numbers can differ from them, so the variance is not exactly 0."""
    sides = {"student": kv(1), "target": kv(2)}
    sides[side][:, 1] = kv(7)[0, 0, :, :1]
    student = sides["student"].requires_grad_()
    loss = kv_distance(student, sides["target"], SCALE_L, MASK_BM, "cka")
    others = [naive_cka(student.detach(), sides["target"], MASK_BM, layer) for layer in (0, 2)]
    assert float(loss.detach()) == pytest.approx(sum(others) / 3, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    assert (gradient[:, 1] == 0).all()
    assert (gradient[:, (0, 2)][~HIDDEN[:, (0, 2)]] != 0).all()


# ---------------------------------------------------------------------------------------------------- reported errors
def test_reported_error_is_squared_error_over_variance_per_layer_and_head() -> None:
    errors_LH = error_by_layer_and_head(with_nan(kv(1)).requires_grad_(), with_nan(kv(2)), SCALE_L, MASK_BM)
    assert errors_LH.shape == (LAYERS, HEADS)
    assert not errors_LH.requires_grad
    for layer, variance in enumerate(SCALE_L.tolist()):
        for head in range(HEADS):
            expected = naive_head(kv(1)[:, layer, head], kv(2)[:, layer, head], MASK_BM, variance**0.5, "mse")
            assert float(errors_LH[layer, head]) == pytest.approx(expected, rel=1e-5)


def test_reported_error_of_a_slot_is_the_mean_over_layers_and_heads() -> None:
    errors_BM = error_by_slot(with_nan(kv(1)).requires_grad_(), with_nan(kv(2)), SCALE_L, MASK_BM)
    assert not errors_BM.requires_grad
    student, target = kv(1, torch.float64), kv(2, torch.float64)
    for sample in range(BATCH):
        for slot in range(SLOTS):
            squares = [
                (x - y) ** 2 / variance
                for layer, variance in enumerate(SCALE_L.tolist())
                for head in range(HEADS)
                for x, y in zip(*(side[sample, layer, head, slot].tolist() for side in (student, target)), strict=True)
            ]
            expected = sum(squares) / len(squares) if MASK_BM[sample, slot] else 0.0
            assert float(errors_BM[sample, slot]) == pytest.approx(expected, rel=1e-5)


def test_mean_of_the_reported_errors_matches_the_naive_loops() -> None:
    expected = naive_distance(kv(1), kv(2), SCALE_L.sqrt().tolist(), MASK_BM, "mse")
    assert float(error_by_layer_and_head(with_nan(kv(1)), with_nan(kv(2)), SCALE_L, MASK_BM).mean()) == pytest.approx(
        expected, rel=1e-5
    )
    assert float(error_by_layer_and_head(kv(1), kv(2), SCALE_L, torch.zeros_like(MASK_BM)).mean()) == 0


def test_predicting_each_features_mean_scores_one() -> None:
    generator = torch.Generator().manual_seed(5)
    feature_scale = 1 + 4 * torch.rand(LAYERS, HEADS, 1, DIM, generator=generator)
    target = 3 + feature_scale * torch.randn(64, LAYERS, HEADS, SLOTS, DIM, generator=generator)
    mask_BM = torch.ones(64, SLOTS, dtype=torch.bool)
    mean = target.mean(dim=(0, 3), keepdim=True)
    variance_L = (target - mean).square().mean(dim=(0, 2, 3, 4))
    by_head_LH = error_by_layer_and_head(mean.expand_as(target), target, variance_L, mask_BM)
    torch.testing.assert_close(by_head_LH.mean(dim=1), torch.ones(LAYERS))
    assert float(by_head_LH.mean()) == pytest.approx(1.0, rel=1e-5)
    assert float(error_by_layer_and_head(target, target, variance_L, mask_BM).mean()) == 0

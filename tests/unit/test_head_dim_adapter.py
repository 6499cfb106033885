"""Maps between K/V features, against least squares on the rows themselves."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from align.head_dim_adapter import (
    TENSORS,
    HeadDimAdapter,
    KVGeometry,
    RidgeStatistics,
    TeacherSpaceRegressor,
    TensorKind,
    fit_ridge,
)
from kvcore.errors import FieldError

TEACHER, STUDENT = KVGeometry(3, 2, 4), KVGeometry(2, 3, 2)
F, G = TEACHER.features, STUDENT.features


def rows(count: int, seed: int, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of x and y, correlated, with means well away from 0."""
    truth = torch.Generator().manual_seed(99)
    weight, spread = torch.randn(F, G, generator=truth), torch.randn(F, F, generator=truth)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, F, generator=generator) @ spread + 5.0
    return x, x @ weight - 3.0 + noise * torch.randn(count, G, generator=generator)


def statistics(*batches: tuple[torch.Tensor, torch.Tensor]) -> RidgeStatistics:
    collected = RidgeStatistics(F, G)
    for x, y in batches:
        collected.update(x, y)
    return collected


def naive_ridge(x: torch.Tensor, y: torch.Tensor, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """lstsq over rows augmented by the penalty's; the intercept is a column of ones without penalty."""
    x64, y64 = x.double().numpy(), y.double().numpy()
    penalty = alpha * np.square(x64 - x64.mean(axis=0)).sum() / F
    top = np.hstack([x64, np.ones((len(x64), 1))])
    bottom = np.hstack([np.sqrt(penalty) * np.eye(F), np.zeros((F, 1))])
    solution = np.linalg.lstsq(np.vstack([top, bottom]), np.vstack([y64, np.zeros((F, G))]), rcond=None)[0]
    return solution[:-1], solution[-1]


def naive_explained(x: torch.Tensor, y: torch.Tensor, weight: np.ndarray, bias: np.ndarray) -> float:
    x64, y64 = x.double().numpy(), y.double().numpy()
    return float(1 - np.square(x64 @ weight + bias - y64).sum() / np.square(y64 - y64.mean(axis=0)).sum())


@pytest.mark.parametrize("alpha", [1e-6, 1e-2, 1.0, 10.0])
@pytest.mark.parametrize("count", [6, 200])  # fewer rows than features, and more
def test_ridge_equals_least_squares_on_augmented_rows(alpha: float, count: int) -> None:
    x, y = rows(count, seed=1)
    held = rows(50, seed=2)
    fit = fit_ridge(statistics((x, y)), statistics(held), alphas=(alpha,))
    weight, bias = naive_ridge(x, y, alpha)
    np.testing.assert_allclose(fit.weight_FG.numpy(), weight, rtol=0, atol=1e-8)
    np.testing.assert_allclose(fit.bias_G.numpy(), bias, rtol=0, atol=1e-7)
    assert fit.explained_variance == pytest.approx(naive_explained(*held, weight, bias), abs=1e-8)


@pytest.mark.parametrize(("count", "noise"), [(9, 8.0), (30, 5.0), (400, 0.1)])
def test_the_penalty_is_the_one_that_errs_least_on_the_rows_held_out(count: int, noise: float) -> None:
    x, y = rows(count, seed=3, noise=noise)
    held = rows(40, seed=4, noise=noise)
    grid = (1e-6, 1e-3, 1e-1, 1.0, 10.0)
    fit = fit_ridge(statistics((x, y)), statistics(held), grid)
    errors = [1 - naive_explained(*held, *naive_ridge(x, y, alpha)) for alpha in grid]
    assert fit.alpha == grid[int(np.argmin(errors))]
    assert fit.explained_variance == pytest.approx(1 - min(errors), abs=1e-8)


def test_the_penalty_depends_on_the_data() -> None:
    chosen = set()
    for count, noise in ((9, 8.0), (400, 0.1)):
        fit = fit_ridge(statistics(rows(count, 3, noise)), statistics(rows(40, 4, noise)))
        chosen.add(fit.alpha)
    assert len(chosen) == 2


def test_statistics_of_parts_add_up_to_those_of_the_whole() -> None:
    x, y = rows(60, seed=5)
    whole = statistics((x, y))
    merged = statistics((x[:11], y[:11])).merged(statistics((x[11:40], y[11:40]), (x[40:], y[40:])))
    reduced, other_rank = statistics((x[:25], y[:25])), statistics((x[25:], y[25:]))
    for mine, theirs in zip(reduced.tensors(), other_rank.tensors(), strict=True):
        mine.add_(theirs)
    for parts in (merged, reduced):
        for part, total in zip(parts.tensors(), whole.tensors(), strict=True):
            torch.testing.assert_close(part, total, rtol=1e-12, atol=1e-9)
    assert merged.count.item() == 60


def test_half_precision_rows_are_summed_in_fp64() -> None:
    x = torch.full((4096, 1), 1.0078125).bfloat16()
    collected = RidgeStatistics(1, 1)
    collected.update(x, x)
    assert collected.sum_x_F.item() == 4096 * 1.0078125
    assert collected.xx_FF.item() == 4096 * 1.0078125**2
    assert collected.yy_G.item() == 4096 * 1.0078125**2


def test_a_mean_far_larger_than_the_spread_does_no_harm() -> None:
    """Keys have outlier channels that hardly vary."""
    x, y = rows(200, seed=6)
    fit = fit_ridge(statistics((x + 1e4, y)), statistics((x + 1e4, y)), alphas=(1e-6,))
    weight, _ = naive_ridge(x.double(), y, 1e-6)
    np.testing.assert_allclose(fit.weight_FG.numpy(), weight, rtol=0, atol=1e-2)
    assert fit.explained_variance > 0.99


def test_features_that_never_vary_do_not_break_the_fit() -> None:
    x, y = rows(100, seed=7)
    x[:, 0], y[:, 1] = 2.0, -1.0
    held = rows(30, seed=8)
    held[0][:, 0], held[1][:, 1] = 2.0, -1.0
    fit = fit_ridge(statistics((x, y)), statistics(held))
    assert torch.isfinite(fit.weight_FG).all()
    np.testing.assert_allclose((held[0].double() @ fit.weight_FG + fit.bias_G)[:, 1], -1.0, atol=1e-6)
    assert fit.explained_variance > 0.9


def layered(count: int, seed: int, layers: int) -> list[RidgeStatistics]:
    """A different map in every layer."""
    return [statistics((x, (layer + 1) * y)) for layer in range(layers) for x, y in [rows(count, seed + layer)]]


def fitted(kind: str) -> HeadDimAdapter:
    adapter = HeadDimAdapter(2, TEACHER, STUDENT, kind)
    adapter.fit("k", layered(100, 10, 2), layered(40, 20, 2))
    adapter.fit("v", layered(100, 30, 2), layered(40, 40, 2))
    return adapter


@pytest.mark.parametrize("tensor", TENSORS)
def test_each_layer_and_tensor_goes_through_its_own_map(tensor: TensorKind) -> None:
    adapter = fitted("ridge")
    x = torch.randn(4, 2, TEACHER.heads, 5, TEACHER.head_dim, generator=torch.Generator().manual_seed(0))
    out = adapter(x, tensor)
    assert out.shape == (4, 2, STUDENT.heads, 5, STUDENT.head_dim)
    seed = {"k": 10, "v": 30}[tensor]
    for layer in range(2):
        fit = fit_ridge(layered(100, seed, 2)[layer], layered(40, seed + 10, 2)[layer])
        for b in range(4):
            for m in range(5):
                features = torch.cat([x[b, layer, h, m] for h in range(TEACHER.heads)]).double()
                expected = features @ fit.weight_FG + fit.bias_G
                got = torch.cat([out[b, layer, h, m] for h in range(STUDENT.heads)])
                torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)
        assert adapter.alpha(tensor)[layer] == fit.alpha
        assert adapter.explained_variance(tensor)[layer] == fit.explained_variance


def test_the_same_statistics_give_the_same_bits() -> None:
    one, other = fitted("ridge").state_tensors(), fitted("ridge").state_tensors()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_ridge_is_frozen_and_linear_starts_from_it_and_trains() -> None:
    ridge, linear = fitted("ridge"), fitted("linear")
    x = torch.randn(2, 2, TEACHER.heads, 3, TEACHER.head_dim)
    assert list(ridge.parameters()) == []
    assert torch.equal(ridge(x, "k"), linear(x, "k"))
    assert not ridge(x, "k").requires_grad
    linear(x, "k").square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in linear.named_parameters()}
    assert len(gradients) == 4
    for name, gradient in gradients.items():
        assert (gradient is not None and bool(gradient.any())) == ("k" in name.split("."))


def test_identity_hands_over_what_came_in() -> None:
    adapter = HeadDimAdapter(2, TEACHER, KVGeometry(2, 2, 4), "identity")
    x = torch.randn(2, 2, 2, 3, 4)
    assert torch.equal(adapter(x, "v"), x)
    assert adapter(x.bfloat16(), "k").dtype == torch.float32
    assert adapter.state_tensors() == {}
    assert adapter.explained_variance("k") == []


def test_identity_between_different_geometries_is_refused() -> None:
    for other in (STUDENT, KVGeometry(2, 4, 2)):
        with pytest.raises(FieldError, match="2 x 4") as caught:
            HeadDimAdapter(2, TEACHER, other, "identity")
        assert caught.value.field == "align.head_adapter"
    with pytest.raises(FieldError, match="'mlp'"):
        HeadDimAdapter(2, TEACHER, STUDENT, "mlp")


@pytest.mark.parametrize("kind", ["ridge", "linear"])
def test_an_adapter_that_was_never_fitted_gives_no_number_that_could_pass_for_a_target(kind: str) -> None:
    adapter = HeadDimAdapter(2, TEACHER, STUDENT, kind)
    assert adapter(torch.zeros(1, 2, 2, 1, 4), "k").isnan().all()


@pytest.mark.parametrize("kind", ["ridge", "linear"])
def test_state_survives_a_safetensors_file(kind: str, tmp_path: Path) -> None:
    adapter = fitted(kind)
    save_file(adapter.state_tensors(), tmp_path / "adapter.safetensors")
    loaded = HeadDimAdapter(2, TEACHER, STUDENT, kind)
    loaded.load_state_tensors(load_file(tmp_path / "adapter.safetensors"))
    x = torch.randn(2, 2, TEACHER.heads, 3, TEACHER.head_dim)
    assert torch.equal(adapter(x, "k"), loaded(x, "k"))
    assert torch.equal(adapter(x, "v"), loaded(x, "v"))
    assert loaded.alpha("k") == adapter.alpha("k")
    assert loaded.explained_variance("v") == adapter.explained_variance("v")


def test_saved_state_does_not_follow_later_training() -> None:
    adapter = fitted("linear")
    saved = adapter.state_tensors()
    before = {name: tensor.clone() for name, tensor in saved.items()}
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(saved[name], before[name]) for name in saved)


def test_badly_explained_layers_are_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    adapter = fitted("ridge")
    noise = [(torch.randn(300, F), torch.randn(300, G)) for _ in range(4)]
    adapter.fit(
        "v", [statistics(rows(100, 1)), statistics(*noise[:2])], [statistics(rows(50, 2)), statistics(*noise[2:])]
    )
    with caplog.at_level(logging.WARNING):
        adapter.warn_if_poor(threshold=0.2, name="big")
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert message.startswith("big: ")
    assert "values in layers 1 (" in message
    caplog.clear()
    fitted("ridge").warn_if_poor()
    assert not caplog.records


def test_the_regressor_can_start_at_random_and_learns() -> None:
    torch.manual_seed(0)
    regressor = TeacherSpaceRegressor(2, STUDENT, TEACHER)
    x = torch.randn(8, 2, STUDENT.heads, 4, STUDENT.head_dim)
    assert regressor(x, "k").shape == (8, 2, TEACHER.heads, 4, TEACHER.head_dim)
    target = torch.randn(8, 2, TEACHER.heads, 4, TEACHER.head_dim)
    optimizer = torch.optim.Adam(regressor.parameters(), lr=0.03)
    losses = []
    for _ in range(60):
        loss = (regressor(x, "k") - target).square().mean() + (regressor(x, "v") - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_regressor_can_start_in_closed_form_with_roles_swapped() -> None:
    x, y = rows(200, seed=1, noise=0.0)
    swapped = RidgeStatistics(G, F)
    swapped.update(y, x)
    regressor = TeacherSpaceRegressor(1, STUDENT, TEACHER)
    regressor.fit("k", [swapped], [swapped])
    fit = fit_ridge(swapped, swapped)
    out = regressor(y.view(1, 200, 1, STUDENT.heads, STUDENT.head_dim).permute(0, 2, 3, 1, 4), "k")
    expected = (y.double() @ fit.weight_FG + fit.bias_G).view(200, TEACHER.heads, TEACHER.head_dim).transpose(0, 1)
    torch.testing.assert_close(out[0, 0].double(), expected, rtol=0, atol=1e-3)
    assert regressor.explained_variance("k")[0] > 0.3

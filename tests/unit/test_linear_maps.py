"""Tests of the closed-form linear maps, compared with least squares and rotations computed from all rows."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.linear_maps import (
    PROCRUSTES_ALPHAS,
    AffineFit,
    RidgeStatistics,
    area_average,
    fit_procrustes,
    fit_ridge,
    measured,
)
from tests.support.feature_rows import Rows, correlated_rows, statistics_of

F, G = 8, 6
SHAPES = [(6, 6), (4, 7), (7, 4), (5, 1), (1, 5)]


def rows(count: int, seed: int, noise: float = 0.3) -> Rows:
    return correlated_rows(count, F, G, seed, noise)


def naive_ridge(x: torch.Tensor, y: torch.Tensor, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Least squares with one extra row per feature for the penalty; the intercept is an unpenalised column of ones."""
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
    fit = fit_ridge(statistics_of((x, y)), statistics_of(held), alphas=(alpha,))
    weight, bias = naive_ridge(x, y, alpha)
    np.testing.assert_allclose(fit.weight_FG.numpy(), weight, rtol=0, atol=1e-8)
    np.testing.assert_allclose(fit.bias_G.numpy(), bias, rtol=0, atol=1e-7)
    assert fit.explained_variance == pytest.approx(naive_explained(*held, weight, bias), abs=1e-8)


@pytest.mark.parametrize(("count", "noise"), [(9, 8.0), (30, 5.0), (400, 0.1)])
def test_the_penalty_with_the_lowest_held_out_error_is_chosen(count: int, noise: float) -> None:
    x, y = rows(count, seed=3, noise=noise)
    held = rows(40, seed=4, noise=noise)
    grid = (1e-6, 1e-3, 1e-1, 1.0, 10.0)
    fit = fit_ridge(statistics_of((x, y)), statistics_of(held), grid)
    errors = [1 - naive_explained(*held, *naive_ridge(x, y, alpha)) for alpha in grid]
    assert fit.alpha == grid[int(np.argmin(errors))]
    assert fit.explained_variance == pytest.approx(1 - min(errors), abs=1e-8)


def naive_reduced_rank(x: torch.Tensor, y: torch.Tensor, alpha: float, rank: int) -> np.ndarray:
    """Reduced-rank ridge (Mukherjee and Zhu 2011): the ridge map, projected by an SVD of its augmented predictions."""
    weight, _ = naive_ridge(x, y, alpha)
    centred = x.double().numpy() - x.double().numpy().mean(axis=0)
    penalty = alpha * np.square(centred).sum() / F
    predictions = np.vstack([centred, np.sqrt(penalty) * np.eye(F)]) @ weight
    directions = np.linalg.svd(predictions, full_matrices=False)[2][:rank]
    return weight @ directions.T @ directions


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("alpha", [1e-6, 1e-1, 10.0])
@pytest.mark.parametrize("count", [6, 200])
def test_ridge_of_a_rank_equals_an_svd_of_the_augmented_predictions(count: int, alpha: float, rank: int) -> None:
    x, y = rows(count, seed=1)
    held = rows(50, seed=2)
    fit = fit_ridge(statistics_of((x, y)), statistics_of(held), (alpha,), rank)
    weight = naive_reduced_rank(x, y, alpha, rank)
    bias = y.double().numpy().mean(axis=0) - x.double().numpy().mean(axis=0) @ weight
    np.testing.assert_allclose(fit.weight_FG.numpy(), weight, rtol=0, atol=1e-7)
    np.testing.assert_allclose(fit.bias_G.numpy(), bias, rtol=0, atol=1e-7)
    assert np.linalg.matrix_rank(fit.weight_FG.numpy(), tol=1e-9) == rank
    assert fit.explained_variance == pytest.approx(naive_explained(*held, weight, bias), abs=1e-7)


def test_the_penalty_of_a_ridge_of_a_rank_is_chosen_at_that_rank() -> None:
    x, y = rows(9, seed=3, noise=8.0)
    held = rows(40, seed=4, noise=8.0)
    grid = (1e-6, 1e-3, 1e-1, 1.0, 10.0)
    errors = [held_out_error(held, x, y, naive_reduced_rank(x, y, alpha, 1)) for alpha in grid]
    fit = fit_ridge(statistics_of((x, y)), statistics_of(held), grid, 1)
    assert fit.alpha == grid[int(np.argmin(errors))]
    assert 1 - fit.explained_variance == pytest.approx(min(errors), abs=1e-8)


def held_out_error(held: Rows, x: torch.Tensor, y: torch.Tensor, weight: np.ndarray) -> float:
    bias = y.double().numpy().mean(axis=0) - x.double().numpy().mean(axis=0) @ weight
    return 1 - naive_explained(*held, weight, bias)


@pytest.mark.parametrize("rank", [G, F + 3])
def test_a_rank_that_limits_nothing_gives_the_ridge_map(rank: int) -> None:
    parts = statistics_of(rows(60, seed=1)), statistics_of(rows(50, seed=2))
    assert torch.equal(fit_ridge(*parts, rank=rank).weight_FG, fit_ridge(*parts).weight_FG)


def test_the_penalty_depends_on_the_data() -> None:
    chosen = set()
    for count, noise in ((9, 8.0), (400, 0.1)):
        fit = fit_ridge(statistics_of(rows(count, 3, noise)), statistics_of(rows(40, 4, noise)))
        chosen.add(fit.alpha)
    assert len(chosen) == 2


def test_statistics_of_parts_sum_to_those_of_the_whole() -> None:
    x, y = rows(60, seed=5)
    whole = statistics_of((x, y))
    merged = statistics_of((x[:11], y[:11])).merged(statistics_of((x[11:40], y[11:40]), (x[40:], y[40:])))
    reduced, other_rank = statistics_of((x[:25], y[:25])), statistics_of((x[25:], y[25:]))
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


def test_ridge_is_accurate_when_the_mean_is_far_larger_than_the_spread() -> None:
    """Keys have outlier channels with a large mean and a small variance."""
    x, y = rows(200, seed=6)
    fit = fit_ridge(statistics_of((x + 1e4, y)), statistics_of((x + 1e4, y)), alphas=(1e-6,))
    weight, _ = naive_ridge(x.double(), y, 1e-6)
    np.testing.assert_allclose(fit.weight_FG.numpy(), weight, rtol=0, atol=1e-2)
    assert fit.explained_variance > 0.99


@pytest.mark.parametrize("fitter", [fit_ridge, fit_procrustes])
def test_constant_features_do_not_break_the_fit(fitter) -> None:
    x, y = rows(100, seed=7)
    x[:, 0], y[:, 1] = 2.0, -1.0
    held = rows(30, seed=8)
    held[0][:, 0], held[1][:, 1] = 2.0, -1.0
    fit = fitter(statistics_of((x, y)), statistics_of(held))
    assert torch.isfinite(fit.weight_FG).all()
    if fitter is fit_ridge:
        np.testing.assert_allclose((held[0].double() @ fit.weight_FG + fit.bias_G)[:, 1], -1.0, atol=1e-6)
        assert fit.explained_variance > 0.9


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 3), (5, 2), (2, 5)])
@pytest.mark.parametrize("fitter", [fit_ridge, fit_procrustes])
def test_constant_inputs_are_mapped_to_the_mean(inputs: int, outputs: int, fitter) -> None:
    x, y = torch.full((20, inputs), 3.0), torch.randn(20, outputs, generator=torch.Generator().manual_seed(0))
    fit = fitter(statistics_of((x, y)), statistics_of((x, y)))
    torch.testing.assert_close(x.double() @ fit.weight_FG + fit.bias_G, y.double().mean(dim=0).expand(20, -1))
    assert fit.explained_variance == pytest.approx(0.0, abs=1e-9)


def semi_orthogonal(inputs: int, outputs: int, generator: torch.Generator) -> torch.Tensor:
    """A random semi-orthogonal matrix [inputs,outputs] from Gram-Schmidt, so independent of the SVD under test."""
    long, short = max(inputs, outputs), min(inputs, outputs)
    columns: list[torch.Tensor] = []
    for _ in range(short):
        column = torch.randn(long, generator=generator, dtype=torch.float64)
        for _ in range(2):  # twice is enough (Kahan)
            for earlier in columns:
                column = column - (column @ earlier) * earlier
        columns.append(column / column.norm())
    basis = torch.stack(columns, dim=1)
    return basis if inputs >= outputs else basis.T


def error_of_rotation(x: torch.Tensor, y: torch.Tensor, rotation: torch.Tensor) -> float:
    """The squared error over rows of this rotation with its least-squares scale and intercept."""
    turned, wanted = x.double() @ rotation, y.double()
    turned, wanted = turned - turned.mean(dim=0), wanted - wanted.mean(dim=0)
    scale = (turned * wanted).sum() / (turned * turned).sum()
    return float((scale * turned - wanted).square().sum())


def error_over_rows(fit: AffineFit, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.double() @ fit.weight_FG + fit.bias_G - y.double()).square().sum())


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.05, 20.0), offset=st.floats(-50.0, 50.0))
def test_procrustes_finds_a_planted_rotation_scale_and_offset(
    inputs: int, outputs: int, seed: int, scale: float, offset: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.2, 3.0, inputs, dtype=torch.float64)  # unequal, so that losing dimensions matters
    x = torch.randn(60, inputs, generator=generator, dtype=torch.float64) * spread - 7.0
    rotation = semi_orthogonal(inputs, outputs, generator)
    y = scale * x @ rotation + offset
    fit = fit_procrustes(statistics_of((x[:40], y[:40])), statistics_of((x[40:], y[40:])))
    torch.testing.assert_close(fit.weight_FG, scale * rotation, rtol=0, atol=1e-8 * max(1.0, scale))
    torch.testing.assert_close(fit.bias_G, torch.full((outputs,), offset, dtype=torch.float64), rtol=0, atol=1e-7)
    if outputs <= inputs:
        assert fit.explained_variance == pytest.approx(1.0, abs=1e-9)
    assert math.isnan(fit.alpha)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_no_random_rotation_has_a_lower_error_than_procrustes(inputs: int, outputs: int, seed: int) -> None:
    x, y = correlated_rows(50, inputs, outputs, seed, noise=2.0)
    generator = torch.Generator().manual_seed(seed)
    collected = statistics_of((x, y))
    fit = fit_procrustes(collected, collected)
    best = error_over_rows(fit, x, y)
    assert best <= error_of_rotation(x, y, fit.weight_FG) * (1 + 1e-9), "scale and intercept are not least squares"
    for _ in range(40):
        assert best <= error_of_rotation(x, y, semi_orthogonal(inputs, outputs, generator)) * (1 + 1e-9)


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 6), (4, 7), (1, 5)])
def test_no_nearby_rotation_has_a_lower_error_without_fewer_outputs(inputs: int, outputs: int) -> None:
    x, y = correlated_rows(50, inputs, outputs, seed=3, noise=2.0)
    collected = statistics_of((x, y))
    fit = fit_procrustes(collected, collected)
    best = error_over_rows(fit, x, y)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            turn = size * torch.randn(outputs, outputs, generator=generator, dtype=torch.float64)
            nearby = fit.weight_FG @ torch.linalg.matrix_exp(turn - turn.T)
            assert best <= error_of_rotation(x, y, nearby) * (1 + 1e-12)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_procrustes_is_one_scale_times_a_semi_orthogonal_map(inputs: int, outputs: int) -> None:
    x, y = correlated_rows(50, inputs, outputs, seed=5, noise=2.0)
    collected = statistics_of((x, y))
    weight = fit_procrustes(collected, collected).weight_FG
    short = weight.T @ weight if inputs >= outputs else weight @ weight.T
    torch.testing.assert_close(short, short[0, 0] * torch.eye(min(inputs, outputs)).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_procrustes_reports_explained_variance_on_held_out_rows(inputs: int, outputs: int) -> None:
    seen = correlated_rows(50, inputs, outputs, seed=6, noise=1.0)
    held = correlated_rows(30, inputs, outputs, seed=7, noise=1.0)
    fit = fit_procrustes(statistics_of(seen), statistics_of(held))
    expected = naive_explained(*held, fit.weight_FG.numpy(), fit.bias_G.numpy())
    assert fit.explained_variance == pytest.approx(expected, abs=1e-9)


def naive_rotation(rows_seen: Rows, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """M (M'M)^-1/2 with the best scale and intercept; M is the ridge map, or X'Y for an infinite penalty."""
    x64, y64 = (part.double().numpy() for part in rows_seen)
    x, y = x64 - x64.mean(axis=0), y64 - y64.mean(axis=0)
    direction = x.T @ y
    if math.isfinite(penalty):
        direction = np.linalg.pinv(x.T @ x + penalty * np.square(x).sum() / x.shape[1] * np.eye(x.shape[1])) @ direction
    values, vectors = np.linalg.eigh(direction.T @ direction)
    rotation = direction @ vectors @ np.diag(values**-0.5) @ vectors.T
    weight = (x @ rotation * y).sum() / np.square(x @ rotation).sum() * rotation
    return weight, y64.mean(axis=0) - x64.mean(axis=0) @ weight


@pytest.mark.parametrize(
    ("count", "noise", "seed", "best"),
    [(60, 0.0, 0, 0), (20, 1.0, 0, 1), (20, 5.0, 1, 2), (9, 5.0, 0, 3), (9, 30.0, 0, 4)],
)
def test_procrustes_with_fewer_outputs_uses_the_penalty_with_the_lowest_held_out_error(
    count: int, noise: float, seed: int, best: int
) -> None:
    seen, held = (correlated_rows(n, 8, 2, at, noise) for n, at in ((count, seed), (400, seed + 100)))
    explained = [naive_explained(*held, *naive_rotation(seen, alpha)) for alpha in PROCRUSTES_ALPHAS]
    assert int(np.argmax(explained)) == best, "the case no longer shows that this penalty is tried"
    fit = fit_procrustes(statistics_of(seen), statistics_of(held))
    assert fit.explained_variance == pytest.approx(max(explained), abs=1e-7)


@pytest.mark.parametrize("fitter", [fit_ridge, fit_procrustes])
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 6), (6, 8)])
def test_two_fits_of_the_same_statistics_are_bitwise_equal(fitter, inputs: int, outputs: int) -> None:
    seen = statistics_of(correlated_rows(40, inputs, outputs, seed=1))
    held = statistics_of(correlated_rows(20, inputs, outputs, seed=2))
    before = [part.clone() for part in seen.tensors() + held.tensors()]
    one, other = fitter(seen, held), fitter(seen, held)
    assert torch.equal(one.weight_FG, other.weight_FG)
    assert torch.equal(one.bias_G, other.bias_G)
    assert one.explained_variance == other.explained_variance
    assert all(torch.equal(old, part) for old, part in zip(before, seen.tensors() + held.tensors(), strict=True))


def naive_area_average(source: int, target: int) -> list[list[float]]:
    """[source][target]: overlap of unit intervals with target intervals, in exact fractions."""
    width = Fraction(source, target)
    table = [[0.0] * target for _ in range(source)]
    for j in range(target):
        for i in range(source):
            shared = min(Fraction(i + 1), (j + 1) * width) - max(Fraction(i), j * width)
            if shared > 0:
                table[i][j] = float(shared / width)
    return table


@settings(max_examples=30)
@given(st.integers(1, 24), st.integers(1, 24))
def test_area_average_weights_are_interval_overlaps(source: int, target: int) -> None:
    got = area_average(source, target)
    assert got.shape == (source, target)
    torch.testing.assert_close(got, torch.tensor(naive_area_average(source, target)).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(got.sum(dim=0), torch.ones(target).double(), rtol=0, atol=1e-12)
    touched = [[value > 0 for value in row] for row in naive_area_average(source, target)]
    assert (got > 0).tolist() == touched, "places that only touch share nothing"


def test_area_average_repeats_when_upsampling_and_averages_when_downsampling() -> None:
    assert area_average(2, 4).tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert area_average(4, 2).tolist() == [[0.5, 0], [0.5, 0], [0, 0.5], [0, 0.5]]
    torch.testing.assert_close(area_average(3, 2), torch.tensor([[2, 0], [1, 1], [0, 2]]).double() / 3)
    assert torch.equal(area_average(5, 5), torch.eye(5).double())


def test_a_given_map_is_measured_without_changing_it() -> None:
    held = rows(30, seed=3)
    weight, bias = torch.randn(F, G, generator=torch.Generator().manual_seed(1)), torch.ones(G)
    fit = measured(weight, bias, statistics_of(held))
    assert torch.equal(fit.weight_FG, weight.double())
    assert torch.equal(fit.bias_G, bias.double())
    assert math.isnan(fit.alpha)
    expected = naive_explained(*held, weight.double().numpy(), bias.double().numpy())
    assert fit.explained_variance == pytest.approx(expected, rel=1e-9)

"""Tests of the adapters between K/V geometries: maps per layer and tensor, saved state and reports."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.head_dim_adapter import KINDS, HeadDimAdapter, KVGeometry, TeacherSpaceRegressor
from align.linear_maps import RidgeStatistics, fit_procrustes, fit_ridge
from kvcore.errors import FieldError
from kvcore.types import TENSORS, TensorKind
from tests.support.feature_rows import Rows, correlated_rows, statistics_of

TEACHER, STUDENT = KVGeometry(3, 2, 4), KVGeometry(2, 3, 2)
WITH_A_MAP = [kind for kind in KINDS if kind not in ("identity", "mapped")]
F, G = TEACHER.features, STUDENT.features


def rows(count: int, seed: int, noise: float = 0.3) -> Rows:
    return correlated_rows(count, F, G, seed, noise)


def statistics_by_layer(count: int, seed: int, layers: int) -> list[RidgeStatistics]:
    """Statistics of each layer; every layer has a different map."""
    return [statistics_of((x, (layer + 1) * y)) for layer in range(layers) for x, y in [rows(count, seed + layer)]]


def fitted(kind: str) -> HeadDimAdapter:
    adapter = HeadDimAdapter(2, TEACHER, STUDENT, kind)
    adapter.fit("k", statistics_by_layer(100, 10, 2), statistics_by_layer(40, 20, 2))
    adapter.fit("v", statistics_by_layer(100, 30, 2), statistics_by_layer(40, 40, 2))
    return adapter


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize(("kind", "fitter"), [("ridge", fit_ridge), ("procrustes", fit_procrustes)])
def test_each_layer_and_tensor_uses_its_own_map(kind: str, fitter, tensor: TensorKind) -> None:
    adapter = fitted(kind)
    x = torch.randn(4, 2, TEACHER.heads, 5, TEACHER.head_dim, generator=torch.Generator().manual_seed(0))
    out = adapter(x, tensor)
    assert out.shape == (4, 2, STUDENT.heads, 5, STUDENT.head_dim)
    seed = {"k": 10, "v": 30}[tensor]
    for layer in range(2):
        fit = fitter(statistics_by_layer(100, seed, 2)[layer], statistics_by_layer(40, seed + 10, 2)[layer])
        for b in range(4):
            for m in range(5):
                features = torch.cat([x[b, layer, h, m] for h in range(TEACHER.heads)]).double()
                expected = features @ fit.weight_FG + fit.bias_G
                got = torch.cat([out[b, layer, h, m] for h in range(STUDENT.heads)])
                torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)
        assert adapter.alpha(tensor)[layer] == pytest.approx(fit.alpha, abs=0, nan_ok=True)
        assert adapter.explained_variance(tensor)[layer] == fit.explained_variance


@pytest.mark.parametrize("kind", WITH_A_MAP)
def test_fits_of_the_same_statistics_are_bitwise_equal(kind: str) -> None:
    one, other = fitted(kind).state_dict(), fitted(kind).state_dict()
    assert one.keys() == other.keys()
    assert all(one[name].numpy().tobytes() == other[name].numpy().tobytes() for name in one)


def test_ridge_maps_of_a_rank_send_all_tokens_into_that_many_dimensions() -> None:
    adapter = HeadDimAdapter(2, TEACHER, STUDENT, "ridge", ridge_rank=2)
    for tensor in TENSORS:
        adapter.fit(tensor, statistics_by_layer(100, 10, 2), statistics_by_layer(40, 20, 2))
        x = torch.randn(4, 2, TEACHER.heads, 5, TEACHER.head_dim, generator=torch.Generator().manual_seed(0))
        y_LNG = adapter(x, tensor).permute(1, 0, 3, 2, 4).reshape(2, -1, G).double()
        for y_NG in y_LNG:
            assert torch.linalg.matrix_rank(y_NG - y_NG.mean(dim=0), atol=1e-4) == 2


@pytest.mark.parametrize("rank", [0, G + 1])
def test_a_rank_that_no_map_has_is_refused(rank: int) -> None:
    with pytest.raises(FieldError, match=rf"align\.ridge_rank: expected 1 to {G}, .*got {rank}"):
        HeadDimAdapter(2, TEACHER, STUDENT, "ridge", ridge_rank=rank)


GEOMETRIES = [
    ((12, 4), (8, 4)),
    ((16, 2), (8, 3)),
    ((4, 6), (8, 4)),
    ((4, 3), (8, 6)),
    ((3, 5), (2, 2)),
    ((1, 4), (3, 1)),
]


@pytest.mark.parametrize("kind", ["pool", "ridge", "procrustes", "linear"])
@pytest.mark.parametrize(("source", "target"), GEOMETRIES)
def test_every_kind_maps_any_geometry_to_any_other(kind: str, source: tuple[int, int], target: tuple[int, int]) -> None:
    teacher, student = KVGeometry(5, *source), KVGeometry(2, *target)
    adapter = HeadDimAdapter(2, teacher, student, kind)
    for seed, tensor in enumerate(TENSORS):
        seen, held = (
            statistics_of(correlated_rows(count, teacher.features, student.features, seed + 7)) for count in (60, 30)
        )
        adapter.fit(tensor, [seen, seen], [held, held])
    x = torch.randn(3, 2, teacher.heads, 4, teacher.head_dim)
    for tensor in TENSORS:
        out = adapter(x, tensor)
        assert out.shape == (3, 2, student.heads, 4, student.head_dim)
        assert out.isfinite().all()
        assert len(adapter.explained_variance(tensor)) == len(adapter.alpha(tensor)) == 2
        assert all(math.isfinite(value) for value in adapter.explained_variance(tensor))
        assert all(math.isfinite(alpha) == (kind in {"ridge", "linear"}) for alpha in adapter.alpha(tensor))


def naive_pool(x: list[list[float]], heads: int, dims: int) -> list[list[float]]:
    """Mean over each rectangle of the [H,D] plane, on a grid so fine that every edge is a grid line."""
    out = [[0.0] * dims for _ in range(heads)]
    for h in range(heads):
        for d in range(dims):
            # Each source row is split into `heads` parts and each column into `dims` parts.
            rows_of_h = [fine // heads for fine in range(h * len(x), (h + 1) * len(x))]
            columns_of_d = [fine // dims for fine in range(d * len(x[0]), (d + 1) * len(x[0]))]
            pieces = [x[i][j] for i in rows_of_h for j in columns_of_d]
            out[h][d] = sum(pieces) / len(pieces)
    return out


@pytest.mark.parametrize(("source", "target"), GEOMETRIES)
def test_pool_averages_rectangles_of_heads_and_dims(source: tuple[int, int], target: tuple[int, int]) -> None:
    adapter = HeadDimAdapter(2, KVGeometry(2, *source), KVGeometry(2, *target), "pool")
    x = torch.randn(2, 2, source[0], 3, source[1], generator=torch.Generator().manual_seed(0))
    for tensor in TENSORS:
        out = adapter(x, tensor)
        assert not out.requires_grad
        for b, layer, m in ((0, 0, 0), (1, 1, 2)):
            expected = torch.tensor(naive_pool(x[b, layer, :, m].tolist(), *target))
            torch.testing.assert_close(out[b, layer, :, m], expected, rtol=0, atol=1e-6)


def test_pool_needs_no_fit_and_fit_only_measures_explained_variance() -> None:
    adapter = HeadDimAdapter(2, TEACHER, STUDENT, "pool")
    assert list(adapter.parameters()) == []
    assert all(math.isnan(value) for value in adapter.explained_variance("k"))
    before = adapter(torch.ones(1, 2, 2, 1, 4), "k")
    torch.testing.assert_close(before, torch.ones(1, 2, 3, 1, 2))
    held = [rows(40, seed) for seed in (1, 2)]
    adapter.fit("k", statistics_by_layer(50, 5, 2), [statistics_of(part) for part in held])
    assert torch.equal(adapter(torch.ones(1, 2, 2, 1, 4), "k"), before)
    for layer, (x, y) in enumerate(held):
        pooled = torch.tensor([naive_pool(row.view(2, 4).tolist(), 3, 2) for row in x]).flatten(1).double()
        expected = 1 - (pooled - y).square().sum() / (y - y.double().mean(dim=0)).square().sum()
        assert adapter.explained_variance("k")[layer] == pytest.approx(float(expected), rel=1e-5)
    assert all(math.isnan(alpha) for alpha in adapter.alpha("k"))
    assert all(math.isnan(value) for value in adapter.explained_variance("v"))


@pytest.mark.parametrize("kind", ["pool", "ridge", "procrustes", "linear"])
def test_slots_are_mapped_independently(kind: str) -> None:
    """Slots without a token may hold any values, NaN included."""
    adapter = fitted(kind)
    x = torch.randn(2, 2, TEACHER.heads, 4, TEACHER.head_dim, generator=torch.Generator().manual_seed(0))
    clean = adapter(x, "v")
    x[1, :, :, 2] = math.nan
    with_nan = adapter(x, "v")
    assert with_nan[1, :, :, 2].isnan().all()
    kept = torch.ones(2, 4, dtype=torch.bool)
    kept[1, 2] = False
    assert torch.equal(with_nan.permute(0, 3, 1, 2, 4)[kept], clean.permute(0, 3, 1, 2, 4)[kept])


def test_ridge_and_procrustes_fit_a_rotated_student_and_pool_does_not() -> None:
    """The teacher's features are the student's, rotated, scaled and shifted."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    y = torch.randn(80, 6, generator=generator) * torch.linspace(0.5, 2.0, 6) + 1.0
    x = 3.0 * y @ rotation + 2.0
    explained = {}
    for kind in ("pool", "ridge", "procrustes"):
        adapter = HeadDimAdapter(1, KVGeometry(1, 2, 3), KVGeometry(1, 3, 2), kind)
        adapter.fit("k", [statistics_of((x[:60], y[:60]))], [statistics_of((x[60:], y[60:]))])
        explained[kind] = adapter.explained_variance("k")[0]
    assert explained["ridge"] > 0.9999
    assert explained["procrustes"] > 0.9999
    assert explained["pool"] < 0.2


@pytest.mark.parametrize("kind", ["pool", "procrustes"])
def test_pool_and_procrustes_have_no_trainable_parameters(kind: str) -> None:
    adapter = fitted(kind)
    assert list(adapter.parameters()) == []
    assert not adapter(torch.randn(2, 2, TEACHER.heads, 3, TEACHER.head_dim), "k").requires_grad


def test_ridge_is_frozen_and_linear_trains_from_the_ridge_fit() -> None:
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


def test_identity_returns_its_input_in_fp32() -> None:
    adapter = HeadDimAdapter(2, TEACHER, KVGeometry(2, 2, 4), "identity")
    x = torch.randn(2, 2, 2, 3, 4)
    assert torch.equal(adapter(x, "v"), x)
    assert adapter(x.bfloat16(), "k").dtype == torch.float32
    assert adapter.state_dict() == {}
    assert adapter.explained_variance("k") == []


def test_identity_between_different_geometries_is_refused() -> None:
    for other in (STUDENT, KVGeometry(2, 4, 2)):
        with pytest.raises(FieldError, match="2 x 4") as caught:
            HeadDimAdapter(2, TEACHER, other, "identity")
        assert caught.value.field == "align.head_adapter"
    with pytest.raises(FieldError, match="'mlp'"):
        HeadDimAdapter(2, TEACHER, STUDENT, "mlp")


@pytest.mark.parametrize("kind", ["ridge", "procrustes", "linear"])
def test_an_unfitted_adapter_returns_nan(kind: str) -> None:
    adapter = HeadDimAdapter(2, TEACHER, STUDENT, kind)
    assert adapter(torch.zeros(1, 2, 2, 1, 4), "k").isnan().all()


@pytest.mark.parametrize("kind", WITH_A_MAP)
def test_state_survives_a_safetensors_file(kind: str, tmp_path: Path) -> None:
    adapter = fitted(kind)
    save_file(adapter.state_dict(), tmp_path / "adapter.safetensors")
    loaded = HeadDimAdapter(2, TEACHER, STUDENT, kind)
    loaded.load_state_dict(load_file(tmp_path / "adapter.safetensors"))
    x = torch.randn(2, 2, TEACHER.heads, 3, TEACHER.head_dim)
    assert torch.equal(adapter(x, "k"), loaded(x, "k"))
    assert torch.equal(adapter(x, "v"), loaded(x, "v"))
    assert loaded.alpha("k") == pytest.approx(adapter.alpha("k"), abs=0, nan_ok=True)
    assert loaded.explained_variance("v") == adapter.explained_variance("v")


def test_layers_with_low_explained_variance_are_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    adapter = fitted("ridge")
    noise = [(torch.randn(300, F), torch.randn(300, G)) for _ in range(4)]
    adapter.fit(
        "v",
        [statistics_of(rows(100, 1)), statistics_of(*noise[:2])],
        [statistics_of(rows(50, 2)), statistics_of(*noise[2:])],
    )
    with caplog.at_level(logging.WARNING):
        adapter.warn_if_poor("big", "try harder")
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert message.startswith("big: ")
    assert "values in layers 1 (" in message
    assert message.endswith("; try harder")
    caplog.clear()
    fitted("ridge").warn_if_poor("big", "try harder")
    assert not caplog.records


def test_the_regressor_trains_from_random_initialisation() -> None:
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


def test_the_regressor_can_start_from_a_ridge_fit_of_student_to_teacher() -> None:
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

"""Tests of the layer maps: fixed strategies, CKA and the learned map."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.layer_map import STRATEGIES, LayerMapper, LearnedLayerMap
from kvcore.errors import ConfigError, FieldError

LAYERS = st.integers(1, 90)
CHOOSING = ("uniform", "last", "skip", "cka")  # one teacher layer for each student layer


def ready_mapper(teacher_layers: int, student_layers: int, strategy: str) -> LayerMapper:
    """A mapper that is ready to use; `cka` is fitted to random similarities."""
    mapper = LayerMapper(teacher_layers, student_layers, strategy)
    if strategy == "cka":
        seed = torch.Generator().manual_seed(teacher_layers * 100 + student_layers)
        mapper.fit_cka(torch.rand(student_layers, teacher_layers, generator=seed))
    return mapper


def chosen(mapper: LayerMapper) -> list[int]:
    """The teacher layer of each student layer; fails if a student layer has more than one."""
    rows = mapper.get_mapping()
    assert list(rows) == list(range(mapper.student_layers))
    assert all(weight == 1.0 for row in rows.values() for _, weight in row)
    return [t for [(t, _)] in rows.values()]


def naive_matrix(teacher_layers: int, student_layers: int) -> torch.Tensor:
    """[S,T]: linear interpolation at each student layer's exact position, in exact fractions."""
    rows = []
    for s in range(student_layers):
        at = (
            Fraction(teacher_layers - 1)
            if student_layers == 1
            else Fraction(s * (teacher_layers - 1), student_layers - 1)
        )
        rows.append([float(max(Fraction(0), 1 - abs(at - t))) for t in range(teacher_layers)])
    return torch.tensor(rows, dtype=torch.float64)


@settings(max_examples=15)
@given(LAYERS, LAYERS)
def test_ratio_interpolates_between_the_two_neighbouring_layers(teacher_layers: int, student_layers: int) -> None:
    matrix = LayerMapper(teacher_layers, student_layers, "ratio").matrix()
    assert matrix.shape == (student_layers, teacher_layers)
    torch.testing.assert_close(matrix.double(), naive_matrix(teacher_layers, student_layers), rtol=0, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=30)
@given(teacher_layers=LAYERS, student_layers=LAYERS)
def test_rows_sum_to_one_with_positive_weights_in_layer_order(
    teacher_layers: int, student_layers: int, strategy: str
) -> None:
    for row in ready_mapper(teacher_layers, student_layers, strategy).get_mapping().values():
        assert sum(weight for _, weight in row) == pytest.approx(1.0, abs=1e-12)
        assert all(weight > 0 for _, weight in row)
        assert [t for t, _ in row] == sorted({t for t, _ in row})


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=30)
@given(teacher_layers=LAYERS, student_layers=st.integers(2, 90))
def test_first_layers_and_last_layers_are_matched_exactly(
    teacher_layers: int, student_layers: int, strategy: str
) -> None:
    mapping = ready_mapper(teacher_layers, student_layers, strategy).get_mapping()
    if strategy != "last" or teacher_layers <= student_layers:
        assert mapping[0] == [(0, 1.0)]
    assert mapping[student_layers - 1] == [(teacher_layers - 1, 1.0)]


@pytest.mark.parametrize("strategy", ["ratio", "uniform", "skip", "cka", "learned"])
def test_student_with_half_the_layers_is_matched_to_the_last_layer(strategy: str) -> None:
    mapping = ready_mapper(24, 12, strategy).get_mapping()
    assert mapping[0] == [(0, 1.0)]
    assert mapping[11] == [(23, 1.0)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=30)
@given(teacher_layers=LAYERS, student_layers=LAYERS)
def test_mean_teacher_depth_never_decreases_with_student_depth(
    teacher_layers: int, student_layers: int, strategy: str
) -> None:
    depths = [
        sum(t * weight for t, weight in row)
        for row in ready_mapper(teacher_layers, student_layers, strategy).get_mapping().values()
    ]
    assert all(deeper >= shallower - 1e-9 for shallower, deeper in itertools.pairwise(depths))


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=30)
@given(teacher_layers=LAYERS, student_layers=LAYERS)
def test_layers_needed_are_exactly_the_layers_with_weight(
    teacher_layers: int, student_layers: int, strategy: str
) -> None:
    mapper = ready_mapper(teacher_layers, student_layers, strategy)
    used = mapper.matrix().sum(dim=0).nonzero().flatten().tolist()
    assert list(mapper.layers_needed) == (list(range(teacher_layers)) if strategy == "learned" else used)


@pytest.mark.parametrize("strategy", ["ratio", "uniform", "last", "skip", "learned"])
@given(layers=LAYERS)
def test_equal_depths_give_the_identity(layers: int, strategy: str) -> None:
    mapper = LayerMapper(layers, layers, strategy)
    assert torch.equal(mapper.matrix(), torch.eye(layers))
    assert mapper.mixes_layers == (strategy == "learned" and layers > 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=30)
@given(teacher_layers=LAYERS)
def test_a_student_of_one_layer_uses_the_last_teacher_layer(teacher_layers: int, strategy: str) -> None:
    assert ready_mapper(teacher_layers, 1, strategy).get_mapping() == {0: [(teacher_layers - 1, 1.0)]}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("student_layers", [1, 2, 5])
def test_a_teacher_of_one_layer_serves_every_student_layer(student_layers: int, strategy: str) -> None:
    mapper = ready_mapper(1, student_layers, strategy)
    assert mapper.get_mapping() == {s: [(0, 1.0)] for s in range(student_layers)}
    assert not mapper.mixes_layers


@settings(max_examples=30)
@given(LAYERS, st.integers(2, 90))
def test_uniform_uses_the_nearest_layer_and_the_earlier_in_a_tie(teacher_layers: int, student_layers: int) -> None:
    for s, got in enumerate(chosen(LayerMapper(teacher_layers, student_layers, "uniform"))):
        depth = Fraction(s * (teacher_layers - 1), student_layers - 1)
        assert got == min(range(teacher_layers), key=lambda t: (abs(t - depth), t))


@given(st.integers(1, 40), st.integers(0, 40))
def test_last_uses_the_last_layers_in_order(student_layers: int, more: int) -> None:
    got = chosen(LayerMapper(student_layers + more, student_layers, "last"))
    assert got == list(range(student_layers + more))[-student_layers:]


@given(st.integers(2, 40), st.integers(0, 60))
def test_skip_uses_an_even_stride_and_ends_at_the_last_layer(student_layers: int, more: int) -> None:
    teacher_layers = student_layers + more
    *strided, last = chosen(LayerMapper(teacher_layers, student_layers, "skip"))
    widest = max(k for k in range(1, teacher_layers) if k * (student_layers - 1) <= teacher_layers - 1)
    assert strided == list(range(0, widest * (student_layers - 1), widest))
    assert last == teacher_layers - 1


def test_uniform_last_and_skip_choose_different_layers() -> None:
    assert chosen(LayerMapper(12, 5, "uniform")) == [0, 3, 5, 8, 11]
    assert chosen(LayerMapper(12, 5, "last")) == [7, 8, 9, 10, 11]
    assert chosen(LayerMapper(12, 5, "skip")) == [0, 2, 4, 6, 11]


@given(LAYERS, st.integers(1, 30))
def test_last_and_skip_equal_ratio_when_the_teacher_is_shallower(teacher_layers: int, more: int) -> None:
    ratio = LayerMapper(teacher_layers, teacher_layers + more, "ratio").get_mapping()
    for strategy in ("last", "skip"):
        assert LayerMapper(teacher_layers, teacher_layers + more, strategy).get_mapping() == ratio


def test_cka_raises_before_it_is_fitted() -> None:
    mapper = LayerMapper(6, 3, "cka")
    assert not mapper.fitted
    assert mapper.layers_needed == (0, 1, 2, 3, 4, 5)
    for use in (mapper.get_mapping, mapper.matrix):
        with pytest.raises(ConfigError, match="fitted"):
            use()
    mapper.fit_cka(torch.tensor([[1.0, 0, 0, 0, 0, 0], [0, 0.1, 0, 0, 0.7, 0], [0, 0, 0, 0, 0, 1.0]]))
    assert mapper.fitted
    assert mapper.get_mapping() == {0: [(0, 1.0)], 1: [(4, 1.0)], 2: [(5, 1.0)]}
    assert mapper.layers_needed == (0, 4, 5)
    assert not mapper.mixes_layers
    assert all(LayerMapper(6, 3, strategy).fitted for strategy in STRATEGIES if strategy != "cka")


def test_cka_finds_a_planted_layer_match() -> None:
    planted = [0, 1, 1, 4, 7, 7, 9]
    cka = 0.5 * torch.rand(7, 10, generator=torch.Generator().manual_seed(0))
    for s, t in enumerate(planted):
        cka[s, t] += 0.5
    mapper = LayerMapper(10, 7, "cka")
    mapper.fit_cka(cka)
    assert chosen(mapper) == planted


def test_invalid_similarities_are_refused() -> None:
    mapper = LayerMapper(3, 2, "cka")
    with pytest.raises(FieldError, match=r"\[3, 2\]"):
        mapper.fit_cka(torch.zeros(3, 2))
    unknown = torch.zeros(2, 3)
    unknown[1, 2] = math.nan
    with pytest.raises(FieldError, match="student layer 1 with teacher layer 2"):
        mapper.fit_cka(unknown)
    assert not mapper.fitted
    with pytest.raises(FieldError, match="got 'uniform'"):
        LayerMapper(3, 2).fit_cka(torch.zeros(2, 3))


def test_a_shallower_teacher_is_interpolated_between_its_layers() -> None:
    assert LayerMapper(2, 4, "ratio").get_mapping() == {
        0: [(0, 1.0)],
        1: [(0, pytest.approx(2 / 3)), (1, pytest.approx(1 / 3))],
        2: [(0, pytest.approx(1 / 3)), (1, pytest.approx(2 / 3))],
        3: [(1, 1.0)],
    }
    assert LayerMapper(1, 3, "ratio").get_mapping() == {s: [(0, 1.0)] for s in range(3)}


def test_a_student_layer_exactly_at_a_teacher_layer_is_not_mixed() -> None:
    mapper = LayerMapper(teacher_layers=7, student_layers=4, strategy="ratio")
    assert mapper.get_mapping() == {0: [(0, 1.0)], 1: [(2, 1.0)], 2: [(4, 1.0)], 3: [(6, 1.0)]}
    assert mapper.layers_needed == (0, 2, 4, 6)
    assert not mapper.mixes_layers
    assert LayerMapper(6, 4, "ratio").mixes_layers


def test_changing_the_returned_mapping_does_not_change_the_mapper() -> None:
    mapper = LayerMapper(4, 2)
    mapper.get_mapping()[0].append((3, 9.0))
    assert mapper.get_mapping()[0] == [(0, 1.0)]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [((0, 2, "ratio"), "teacher_layers"), ((2, -1, "ratio"), "student_layers"), ((2, 2, "nearby"), "strategy")],
)
def test_invalid_arguments_are_refused_by_name(arguments: tuple[int, int, str], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        LayerMapper(*arguments)
    assert caught.value.field == field
    wrong = arguments[("teacher_layers", "student_layers", "strategy").index(field)]
    assert str(wrong) in str(caught.value)


def values(layers: int, seed: int) -> torch.Tensor:
    """[B,L,H,M,D] in fp64."""
    return torch.randn(2, layers, 2, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_mix(logits: list[list[float]], x: torch.Tensor) -> torch.Tensor:
    """Softmax of each row and a weighted sum over layers, one number at a time, in fp64."""
    batch, layers, heads, slots, dim = x.shape
    out = torch.zeros(batch, len(logits), heads, slots, dim, dtype=torch.float64)
    for s, row in enumerate(logits):
        total = sum(math.exp(logit) for logit in row)
        for t in range(layers):
            out[:, s] += math.exp(row[t]) / total * x[:, t].double()
    return out


@pytest.mark.parametrize(("teacher_layers", "student_layers"), [(5, 3), (2, 4), (1, 2), (3, 1)])
def test_a_learned_map_starts_at_ratio_with_a_floor(teacher_layers: int, student_layers: int) -> None:
    mapper = LayerMapper(teacher_layers, student_layers, "learned")
    weights = LearnedLayerMap(mapper, floor=0.2).weights()
    expected = 0.8 * naive_matrix(teacher_layers, student_layers) + 0.2 / teacher_layers
    torch.testing.assert_close(weights.double(), expected, rtol=0, atol=1e-6)
    assert not weights.requires_grad
    assert bool((LearnedLayerMap(mapper).weights() > 0).all())
    torch.testing.assert_close(LearnedLayerMap(mapper).weights(), mapper.matrix(), rtol=0, atol=0.0101)


@settings(max_examples=20)
@given(teacher_layers=st.integers(1, 5), student_layers=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_a_learned_map_mixes_all_layers_with_softmax_weights(
    teacher_layers: int, student_layers: int, seed: int
) -> None:
    learned = LearnedLayerMap(LayerMapper(teacher_layers, student_layers, "learned"))
    with torch.no_grad():
        learned.logits_SL.normal_(generator=torch.Generator().manual_seed(seed))
    x = values(teacher_layers, seed)
    out = learned(x.float())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), naive_mix(learned.logits_SL.tolist(), x), rtol=0, atol=1e-5)
    assert learned(x.bfloat16()).dtype == torch.float32


def test_gradients_of_a_learned_map_match_finite_differences() -> None:
    learned = LearnedLayerMap(LayerMapper(4, 3, "learned"), floor=0.3)
    x, direction = values(4, seed=1), values(3, seed=2)
    x32 = x.float().requires_grad_()
    (learned(x32) * direction.float()).sum().backward()
    logits = learned.logits_SL.detach().double()

    def loss(moved: torch.Tensor, at: torch.Tensor) -> float:
        return float((naive_mix(moved.tolist(), at) * direction).sum())

    step = 1e-6
    assert learned.logits_SL.grad is not None
    for s in range(3):
        for t in range(4):
            nudge = torch.zeros_like(logits)
            nudge[s, t] = step
            slope = (loss(logits + nudge, x) - loss(logits - nudge, x)) / (2 * step)
            assert learned.logits_SL.grad[s, t].item() == pytest.approx(slope, abs=1e-5)
    assert x32.grad is not None
    for place in ((0, 0, 0, 0, 0), (1, 3, 1, 2, 1), (0, 2, 1, 0, 0)):
        nudge = torch.zeros_like(x)
        nudge[place] = step
        slope = (loss(logits, x + nudge) - loss(logits, x - nudge)) / (2 * step)
        assert x32.grad[place].item() == pytest.approx(slope, abs=1e-5)


def test_a_learned_map_learns_the_layer_that_the_target_came_from() -> None:
    learned = LearnedLayerMap(LayerMapper(5, 2, "learned"), floor=0.1)
    x = torch.randn(4, 5, 1, 4, 2, generator=torch.Generator().manual_seed(0))
    for _ in range(50):
        loss = (learned(x) - x[:, [3, 1]]).square().mean()
        (gradient,) = torch.autograd.grad(loss, [learned.logits_SL])
        with torch.no_grad():
            learned.logits_SL.sub_(20.0 * gradient)
    assert learned.weights().argmax(dim=1).tolist() == [3, 1]
    assert learned.weights().max(dim=1).values.min() > 0.9


@pytest.mark.parametrize("floor", [0.0, -0.1, 1.1, math.nan])
def test_a_floor_outside_its_range_is_refused(floor: float) -> None:
    with pytest.raises(FieldError, match="floor"):
        LearnedLayerMap(LayerMapper(4, 2, "learned"), floor)

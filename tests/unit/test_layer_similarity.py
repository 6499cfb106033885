"""Tests of streamed linear CKA against loops over all rows, and of the monotone path against all possible paths."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.layer_similarity import CKAStatistics, monotone_path

Rows = tuple[torch.Tensor, torch.Tensor]


def layered_rows(count: int, teacher: tuple[int, int], student: tuple[int, int], seed: int) -> Rows:
    """Correlated rows [N,L,F] and [N,S,G] with nonzero means."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(count, 3, generator=generator, dtype=torch.float64)

    def side(layers: int, features: int) -> torch.Tensor:
        mix = torch.randn(layers, 3, features, generator=generator, dtype=torch.float64)
        noise = torch.randn(count, layers, features, generator=generator, dtype=torch.float64)
        return torch.einsum("nc,lcf->nlf", common, mix) + noise + 4.0

    return side(*teacher), side(*student)


def collected(*batches: Rows) -> CKAStatistics:
    (_, layers, features), (_, student_layers, student_features) = batches[0][0].shape, batches[0][1].shape
    statistics = CKAStatistics(layers, student_layers, features, student_features)
    for x, y in batches:
        statistics.update(x, y)
    return statistics


def centred(rows: list[list[float]]) -> list[list[float]]:
    means = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
    return [[value - mean for value, mean in zip(row, means, strict=True)] for row in rows]


def gram(rows: list[list[float]]) -> list[list[float]]:
    """Inner products of all pairs of rows: CKA by its N x N form instead of F x G."""
    return [[sum(a * b for a, b in zip(one, other, strict=True)) for other in rows] for one in rows]


def naive_cka(x: list[list[float]], y: list[list[float]]) -> float:
    k, l = gram(centred(x)), gram(centred(y))

    def inner(a: list[list[float]], b: list[list[float]]) -> float:
        return math.fsum(p * q for one, other in zip(a, b, strict=True) for p, q in zip(one, other, strict=True))

    return inner(k, l) / math.sqrt(inner(k, k) * inner(l, l))


@settings(max_examples=20)
@given(
    count=st.integers(3, 9),
    teacher=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    student=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    cut=st.integers(0, 9),
    seed=st.integers(0, 10**6),
)
def test_cka_equals_plain_loops_over_all_rows(
    count: int, teacher: tuple[int, int], student: tuple[int, int], cut: int, seed: int
) -> None:
    x, y = layered_rows(count, teacher, student, seed)
    got = collected((x[:cut], y[:cut]), (x[cut:], y[cut:])).cka_ST()
    assert got.dtype == torch.float64
    assert got.shape == (student[0], teacher[0])
    for s in range(student[0]):
        for t in range(teacher[0]):
            expected = naive_cka(x[:, t].tolist(), y[:, s].tolist())
            assert got[s, t].item() == pytest.approx(expected, abs=1e-10)


def test_sums_over_ranks_equal_those_of_all_rows() -> None:
    x, y = layered_rows(40, (3, 4), (2, 5), seed=1)
    whole, mine, theirs = collected((x, y)), collected((x[:13], y[:13])), collected((x[13:], y[13:]))
    for total, other in zip(mine.tensors(), theirs.tensors(), strict=True):
        total.add_(other)
    torch.testing.assert_close(mine.cka_ST(), whole.cka_ST(), rtol=0, atol=1e-12)
    assert mine.count.item() == 40


def test_cka_is_invariant_to_rotation_scale_and_offset() -> None:
    x, y = layered_rows(50, (2, 4), (2, 4), seed=2)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)).double()).Q
    rotated = 0.01 * x @ rotation + 3.0
    torch.testing.assert_close(collected((rotated, y)).cka_ST(), collected((x, y)).cka_ST(), rtol=0, atol=1e-9)
    with_itself = collected((x, rotated)).cka_ST()
    torch.testing.assert_close(with_itself.diagonal(), torch.ones(2).double(), rtol=0, atol=1e-9)
    assert with_itself[0, 1] < 0.99


@given(st.integers(0, 10**6))
def test_similarities_lie_between_0_and_1(seed: int) -> None:
    got = collected(layered_rows(5, (3, 6), (2, 4), seed)).cka_ST()
    assert bool(((got >= 0) & (got <= 1 + 1e-12)).all())


def test_unrelated_layers_score_low_and_related_ones_high() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2000, 2, 4, generator=generator)
    y = torch.stack([torch.randn(2000, 3, generator=generator), x[:, 1, :3] * 2 + 1], dim=1)
    cka = collected((x, y)).cka_ST()
    assert cka[1, 1] > 0.8
    assert max(cka[0, 0], cka[0, 1], cka[1, 0]) < 0.05


def test_half_precision_rows_are_summed_in_fp64() -> None:
    """The square of 1.0078125 does not fit in bf16, and the sum of the squares does not fit in fp32."""
    statistics = CKAStatistics(1, 1, 1, 1)
    x = torch.full((4096, 1, 1), 1.0078125).bfloat16()
    statistics.update(x, x)
    for sums in (statistics.xx_TFF, statistics.yy_SGG, statistics.xy_TFSG):
        assert sums.item() == 4096 * 1.0078125**2


def test_cka_is_accurate_when_the_mean_is_far_larger_than_the_spread() -> None:
    x, y = layered_rows(200, (2, 4), (2, 3), seed=5)
    torch.testing.assert_close(collected((x + 1e4, y - 1e4)).cka_ST(), collected((x, y)).cka_ST(), rtol=0, atol=1e-6)


def test_similarity_of_a_constant_layer_is_nan() -> None:
    x, y = layered_rows(30, (3, 4), (2, 3), seed=6)
    x[:, 1] = 0.1
    unknown = collected((x, y)).cka_ST().isnan()
    assert unknown.tolist() == [[False, True, False]] * 2
    y[:, 0] = -0.3
    assert collected((x, y)).cka_ST().isnan().tolist() == [[True, True, True], [False, True, False]]


def test_similarity_of_fewer_than_two_rows_is_nan() -> None:
    x, y = layered_rows(1, (2, 3), (2, 3), seed=7)
    assert collected((x, y)).cka_ST().isnan().all()
    assert CKAStatistics(2, 2, 3, 3).cka_ST().isnan().all()


def test_computing_cka_does_not_change_the_sums() -> None:
    statistics = collected(layered_rows(20, (2, 3), (2, 3), seed=8))
    before = [part.clone() for part in statistics.tensors()]
    assert torch.equal(statistics.cka_ST(), statistics.cka_ST())
    assert all(torch.equal(old, part) for old, part in zip(before, statistics.tensors(), strict=True))


def every_path(student_layers: int, teacher_layers: int) -> list[tuple[int, ...]]:
    """All nondecreasing paths from the first to the last teacher layer."""
    return [
        path
        for path in itertools.combinations_with_replacement(range(teacher_layers), student_layers)
        if path[0] == 0 and path[-1] == teacher_layers - 1
    ]


TABLES = st.tuples(st.integers(2, 5), st.integers(1, 6)).flatmap(
    lambda size: st.lists(
        st.lists(st.integers(0, 20), min_size=size[1], max_size=size[1]), min_size=size[0], max_size=size[0]
    )
)


@given(TABLES)
def test_the_path_has_the_highest_sum_of_all_paths(table: list[list[int]]) -> None:
    """Integers make sums exact and ties common."""
    path = monotone_path(table)
    paths = every_path(len(table), len(table[0]))
    best = max(sum(table[s][t] for s, t in enumerate(tried)) for tried in paths)
    assert tuple(path) in paths
    assert sum(table[s][t] for s, t in enumerate(path)) == best


def test_the_path_never_goes_back_for_a_better_match() -> None:
    """The largest entries of the rows are at 1, 3, 1, 0."""
    table = [[0.1, 0.9, 0.0, 0.0], [0.0, 0.5, 0.0, 0.6], [0.0, 0.7, 0.2, 0.0], [0.9, 0.0, 0.0, 0.1]]
    assert monotone_path(table) == [0, 1, 1, 3]


def test_ties_prefer_earlier_teacher_layers() -> None:
    assert monotone_path([[1.0] * 4] * 3) == [0, 0, 3]


def test_a_student_of_one_layer_uses_the_last_teacher_layer() -> None:
    assert monotone_path([[0.9, 0.1, 0.2]]) == [2]
    assert monotone_path([[0.9]] * 3) == [0, 0, 0]

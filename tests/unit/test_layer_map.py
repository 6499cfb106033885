"""Which teacher layers a student layer draws on."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.layer_map import LayerMapper
from kvcore.errors import FieldError

LAYERS = st.integers(1, 90)


def naive_matrix(teacher_layers: int, student_layers: int) -> torch.Tensor:
    """Hat functions around the exact position, over every pair of layers."""
    matrix = torch.zeros(student_layers, teacher_layers, dtype=torch.float64)
    for s in range(student_layers):
        at = (
            Fraction(teacher_layers - 1)
            if student_layers == 1
            else Fraction(s * (teacher_layers - 1), student_layers - 1)
        )
        for t in range(teacher_layers):
            matrix[s, t] = float(max(Fraction(0), 1 - abs(at - t)))
    return matrix


@given(LAYERS, LAYERS)
def test_ratio_interpolates_between_the_two_neighbouring_layers(teacher_layers: int, student_layers: int) -> None:
    matrix = LayerMapper(teacher_layers, student_layers).matrix()
    assert matrix.shape == (student_layers, teacher_layers)
    torch.testing.assert_close(matrix.double(), naive_matrix(teacher_layers, student_layers), rtol=0, atol=1e-6)


@given(LAYERS, LAYERS)
def test_rows_sum_to_one_and_hold_no_empty_weight(teacher_layers: int, student_layers: int) -> None:
    for row in LayerMapper(teacher_layers, student_layers).get_mapping().values():
        assert sum(weight for _, weight in row) == pytest.approx(1.0, abs=1e-12)
        assert all(weight > 0 for _, weight in row)
        assert [t for t, _ in row] == sorted({t for t, _ in row})


@given(LAYERS, st.integers(2, 90))
def test_first_meets_first_and_last_meets_last_exactly(teacher_layers: int, student_layers: int) -> None:
    mapping = LayerMapper(teacher_layers, student_layers).get_mapping()
    assert mapping[0] == [(0, 1.0)]
    assert mapping[student_layers - 1] == [(teacher_layers - 1, 1.0)]


@given(LAYERS, LAYERS)
def test_layers_needed_are_those_with_weight_and_no_others(teacher_layers: int, student_layers: int) -> None:
    mapper = LayerMapper(teacher_layers, student_layers)
    used = mapper.matrix().sum(dim=0).nonzero().flatten().tolist()
    assert list(mapper.layers_needed) == used


@given(LAYERS)
def test_equal_depths_give_the_identity(layers: int) -> None:
    mapper = LayerMapper(layers, layers)
    assert torch.equal(mapper.matrix(), torch.eye(layers))
    assert not mapper.mixes_layers


@given(LAYERS)
def test_a_student_of_one_layer_takes_the_last(teacher_layers: int) -> None:
    assert LayerMapper(teacher_layers, 1).get_mapping() == {0: [(teacher_layers - 1, 1.0)]}


def test_a_shallower_teacher_is_shared_among_neighbouring_student_layers() -> None:
    assert LayerMapper(2, 4).get_mapping() == {
        0: [(0, 1.0)],
        1: [(0, pytest.approx(2 / 3)), (1, pytest.approx(1 / 3))],
        2: [(0, pytest.approx(1 / 3)), (1, pytest.approx(2 / 3))],
        3: [(1, 1.0)],
    }
    assert LayerMapper(1, 3).get_mapping() == {s: [(0, 1.0)] for s in range(3)}


def test_layers_that_fall_on_a_teacher_layer_are_not_mixed() -> None:
    mapper = LayerMapper(teacher_layers=7, student_layers=4, strategy="ratio")
    assert mapper.get_mapping() == {0: [(0, 1.0)], 1: [(2, 1.0)], 2: [(4, 1.0)], 3: [(6, 1.0)]}
    assert mapper.layers_needed == (0, 2, 4, 6)
    assert not mapper.mixes_layers
    assert LayerMapper(6, 4).mixes_layers


def test_the_mapping_handed_out_can_be_changed_without_harm() -> None:
    mapper = LayerMapper(4, 2)
    mapper.get_mapping()[0].append((3, 9.0))
    assert mapper.get_mapping()[0] == [(0, 1.0)]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [((0, 2, "ratio"), "teacher_layers"), ((2, -1, "ratio"), "student_layers"), ((2, 2, "nearby"), "strategy")],
)
def test_bad_arguments_are_refused_by_name(arguments: tuple[int, int, str], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        LayerMapper(*arguments)
    assert caught.value.field == field
    wrong = arguments[("teacher_layers", "student_layers", "strategy").index(field)]
    assert str(wrong) in str(caught.value)

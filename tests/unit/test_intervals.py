"""Tests of Wilson's interval."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.intervals import wilson_interval

Z = 1.959963984540054


@given(st.integers(1, 2000), st.data())
def test_ends_are_where_the_score_test_just_rejects(count: int, data: st.DataObject) -> None:
    share = data.draw(st.integers(0, count)) / count
    low, high = wilson_interval(share, count)
    assert 0.0 <= low <= share <= high <= 1.0
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(share - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / count), rel=1e-6)


def test_interval_has_a_width_even_if_all_answers_are_right() -> None:
    assert wilson_interval(1.0, 100) == (pytest.approx(0.9630, abs=1e-4), 1.0)
    assert wilson_interval(0.0, 100) == (0.0, pytest.approx(0.0370, abs=1e-4))

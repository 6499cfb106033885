"""Tests of the mix of data sets: integer shares by weight, limited by the size of each data set."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.mixing import apportion, apportion_splits

NAMES = st.sampled_from("abcdef")
WEIGHTS = st.dictionaries(NAMES, st.floats(0.01, 100.0), min_size=1)


@pytest.mark.parametrize(
    ("total", "weights", "capacities", "shares"),
    [
        (10, {"a": 1, "b": 1}, {"a": 99, "b": 99}, {"a": 5, "b": 5}),
        (10, {"a": 3, "b": 1}, {"a": 99, "b": 99}, {"a": 8, "b": 2}),
        (10, {"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 99, "c": 99}, {"a": 1, "b": 5, "c": 4}),
        (10, {"a": 1, "b": 1}, {"a": 2, "b": 3}, {"a": 2, "b": 3}),
        (10, {"a": 0, "b": 1}, {"a": 99, "b": 4}, {"a": 0, "b": 4}),
        (0, {}, {}, {}),
    ],
)
def test_small_datasets_give_all_records_and_others_fill_the_gap(
    total: int, weights: dict[str, float], capacities: dict[str, int], shares: dict[str, int]
) -> None:
    assert apportion(total, weights, capacities) == shares


@given(total=st.integers(0, 300), weights=WEIGHTS, data=st.data())
def test_shares_sum_to_the_total_and_are_as_even_as_integers_allow(
    total: int, weights: dict[str, float], data: st.DataObject
) -> None:
    capacities = {name: data.draw(st.integers(0, 80)) for name in weights}
    shares = apportion(total, weights, capacities)
    assert sum(shares.values()) == min(total, sum(capacities.values()))
    assert all(0 <= shares[name] <= capacities[name] for name in weights)
    # Data sets with records left have even shares per weight, at least those of the exhausted data sets.
    levels = {name: shares[name] / weights[name] for name in weights}
    for name, weight in weights.items():
        if shares[name] < capacities[name]:
            assert all(
                levels[other] <= (shares[name] + 1) / weight + 1 / share + 1e-6 for other, share in weights.items()
            )


@given(train=st.integers(1, 500), val=st.integers(1, 500), weights=WEIGHTS, data=st.data())
def test_both_splits_have_the_same_mix(train: int, val: int, weights: dict[str, float], data: st.DataObject) -> None:
    capacities = {name: data.draw(st.integers(0, 400)) for name in weights}
    splits = apportion_splits(train, val, weights, capacities)
    totals = [sum(pair[place] for pair in splits.values()) for place in (0, 1)]
    assert all(sum(splits[name]) <= capacities[name] for name in weights)
    assert all(min(pair) >= 0 for pair in splits.values())
    if sum(capacities.values()) >= train + val:
        assert totals == [train, val]
    for pair in splits.values():
        assert abs(pair[1] - sum(pair) * totals[1] / max(sum(totals), 1)) <= 1

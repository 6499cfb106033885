"""How many records each dataset contributes to each split: by weight, limited by its size."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import floor


def apportion(total: int, weights: Mapping[str, float], capacities: Mapping[str, int]) -> dict[str, int]:
    """Divides `total` by weight. If a dataset is too small for its share, the others get the rest by their weights.

    Shares are rounded by largest remainder, ties in the order of `weights`. They sum to `total`, or to all records if
    there are fewer.
    """
    shares = dict.fromkeys(weights, 0)
    open_names = [name for name in weights if weights[name] > 0]
    while open_names:
        exact = _exact(total, weights, open_names)
        full = [name for name in open_names if capacities[name] <= exact[name]]
        if not full:
            return shares | _largest_remainder(total, exact)
        for name in full:
            shares[name] = capacities[name]
            total -= capacities[name]
            open_names.remove(name)
    return shares


def apportion_splits(
    train: int, val: int, weights: Mapping[str, float], capacities: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Each dataset's (train, val) counts, with the same mix. Too few records shrink both splits in proportion."""
    shares = apportion(train + val, weights, capacities)
    val_total = round(Fraction(sum(shares.values()) * val, max(train + val, 1)))
    val_shares = apportion(val_total, shares, shares)
    return {name: (share - val_shares[name], val_shares[name]) for name, share in shares.items()}


def _exact(total: int, weights: Mapping[str, float], names: list[str]) -> dict[str, Fraction]:
    whole = sum(Fraction(weights[name]) for name in names)
    return {name: total * Fraction(weights[name]) / whole for name in names}


def _largest_remainder(total: int, exact: Mapping[str, Fraction]) -> dict[str, int]:
    shares = {name: floor(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares

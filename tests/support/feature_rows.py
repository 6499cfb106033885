"""Rows of features that two models might give to the same tokens, and their sums."""

from __future__ import annotations

import torch

from align.linear_maps import RidgeStatistics

Rows = tuple[torch.Tensor, torch.Tensor]


def correlated_rows(count: int, inputs: int, outputs: int, seed: int, noise: float = 0.3) -> Rows:
    """x and y around means well away from 0: y is one and the same linear map of x for all seeds, and noise."""
    truth = torch.Generator().manual_seed(99)
    weight, spread = torch.randn(inputs, outputs, generator=truth), torch.randn(inputs, inputs, generator=truth)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator) @ spread + 5.0
    return x, x @ weight - 3.0 + noise * torch.randn(count, outputs, generator=generator)


def statistics_of(*batches: Rows) -> RidgeStatistics:
    """The sums over all batches."""
    collected = RidgeStatistics(batches[0][0].shape[1], batches[0][1].shape[1])
    for x, y in batches:
        collected.update(x, y)
    return collected

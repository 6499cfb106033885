"""Correlated feature rows of two models for the same tokens, and their ridge statistics."""

from __future__ import annotations

import torch

from align.linear_maps import RidgeStatistics

Rows = tuple[torch.Tensor, torch.Tensor]


def correlated_rows(count: int, inputs: int, outputs: int, seed: int, noise: float = 0.3) -> Rows:
    """Rows x and y with means far from 0. y is a linear map of x, the same for all seeds, plus noise."""
    truth = torch.Generator().manual_seed(99)
    weight, spread = torch.randn(inputs, outputs, generator=truth), torch.randn(inputs, inputs, generator=truth)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator) @ spread + 5.0
    return x, x @ weight - 3.0 + noise * torch.randn(count, outputs, generator=generator)


def statistics_of(*batches: Rows) -> RidgeStatistics:
    """The ridge statistics over all batches."""
    collected = RidgeStatistics(batches[0][0].shape[1], batches[0][1].shape[1])
    for x, y in batches:
        collected.update(x, y)
    return collected

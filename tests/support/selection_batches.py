"""Random keys, importance and candidates to select from."""

from __future__ import annotations

import torch

from kvcore.types import Tensor

LAYERS, HEADS, TOKENS, HEAD_DIM = 3, 2, 14, 8


def random_batch(batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random candidates_BN with a different start in each sample, k_BLHTD and importance_BLHT."""
    generator = torch.Generator().manual_seed(seed)
    k_BLHTD = torch.randn(batch, LAYERS, HEADS, TOKENS, HEAD_DIM, generator=generator)
    importance_BLHT = torch.rand(batch, LAYERS, HEADS, TOKENS, generator=generator)
    starts = torch.randint(0, 5, (batch, 1), generator=generator)
    candidates_BN = starts + torch.tensor([0, 1, 2, 3, 5, 6, 7, 9])
    return candidates_BN, k_BLHTD, importance_BLHT

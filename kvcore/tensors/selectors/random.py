"""`random`: tokens drawn uniformly without replacement, as a baseline for the other selectors.

The draw depends only on the selection's seed and the sample's tokens, so a sample gets the same tokens from every
replica, on every device, in every batch and epoch. It uses integer arithmetic instead of a library's generator, whose
output may change between versions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from kvcore.plan import Selection
from kvcore.tensors.selectors.base import Candidates, TokenSelector, best_places
from kvcore.types import Tensor


def sample_seed(seed: int, token_ids: Sequence[int]) -> int:
    """A sample's seed, signed 64 bits: BLAKE2b of `seed` and the token ids, each as a little-endian int64."""
    content = np.asarray([seed, *token_ids], dtype="<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def draw_scores(seeds_B: Tensor, choosers_G: Tensor, count: int) -> Tensor:
    """A random int64 for each of `count` candidates of each chooser, [B,G,N], by SplitMix64."""
    states_BG = _splitmix64(seeds_B[:, None], choosers_G)
    return _splitmix64(states_BG[..., None], torch.arange(count, device=seeds_B.device))


def _draw(candidates: Candidates, selection: Selection, slots: int) -> Tensor:
    assert candidates.seeds_B is not None, "random needs the samples' seeds"
    # In scope `sample` the draw must not depend on the layer.
    first = 0 if selection.scope == "sample" else candidates.layer * candidates.choosers
    choosers_G = torch.arange(first, first + candidates.choosers, device=candidates.seeds_B.device)
    return best_places(draw_scores(candidates.seeds_B, choosers_G, candidates.count), slots)


def _splitmix64(state: Tensor, step: Tensor) -> Tensor:
    """The generator's output at `step` from `state`, as signed int64; multiplication wraps (Steele et al., 2014)."""
    z = state + (step + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _signed(word: int) -> int:
    return word - (1 << 64)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own shift keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


RANDOM = TokenSelector(_draw, draws=True)

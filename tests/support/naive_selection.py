"""Reference implementations of the selectors in plain Python, for one sample and one head at a time."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence

WORD = 1 << 64


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """The cosine similarity, 0 if one vector is zero."""
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


def r_kv_scores(keys: Sequence[Sequence[float]], importance: Sequence[float], weight: float) -> list[float]:
    """weight*I + (1-weight)*softmax_i(-mean_j cos(k_i, k_j)), where the diagonal counts as 0; keys [N][D]."""
    count = len(keys)
    similar = [[0.0 if i == j else cosine(keys[i], keys[j]) for j in range(count)] for i in range(count)]
    exponentials = [math.exp(-sum(row) / count) for row in similar]
    redundancy = [value / sum(exponentials) for value in exponentials]
    return [weight * i + (1 - weight) * r for i, r in zip(importance, redundancy, strict=True)]


def centred(keys: Sequence[Sequence[float]]) -> list[list[float]]:
    """The keys without their mean; keys [N][D]."""
    mean = [sum(column) / len(keys) for column in zip(*keys, strict=True)]
    return [[x - m for x, m in zip(key, mean, strict=True)] for key in keys]


def keydiff_scores(keys: Sequence[Sequence[float]]) -> list[float]:
    """The negative cosine of each key with the mean of the normalised keys; keys [N][D]."""
    units = []
    for key in keys:
        norm = math.sqrt(sum(x * x for x in key))
        units.append([x / norm if norm else 0.0 for x in key])
    anchor = [sum(column) / len(keys) for column in zip(*units, strict=True)]
    return [-cosine(key, anchor) for key in keys]


def random_scores(seed: int, token_ids: Sequence[int], chooser: int, count: int) -> list[int]:
    """SplitMix64, started from the chooser-th output of the generator that the sample's hash seeds."""
    digest = hashlib.blake2b(struct.pack(f"<{len(token_ids) + 1}q", seed, *token_ids), digest_size=8).digest()
    state = splitmix64(struct.unpack("<Q", digest)[0], chooser + 1)[-1]
    return [word - WORD if word >= WORD // 2 else word for word in splitmix64(state, count)]


def splitmix64(state: int, count: int) -> list[int]:
    """The first outputs of the published generator, unsigned."""
    words = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % WORD
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % WORD
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
        words.append(z ^ (z >> 31))
    return words


def mean_scores(scores: Sequence[Sequence[float]]) -> list[float]:
    """The mean over heads for each token."""
    return [sum(column) / len(scores) for column in zip(*scores, strict=True)]


def best(scores: Sequence[float], candidates: Sequence[int], budget: int) -> list[int]:
    """The candidates with the highest scores, in time order. On equal scores the earlier one is chosen."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:budget]
    return sorted(candidates[i] for i in order)


def margin(scores: Sequence[float], budget: int) -> float:
    """The difference between the lowest selected score and the highest score that is not selected."""
    ranked = sorted(scores, reverse=True)
    return ranked[budget - 1] - ranked[budget] if budget < len(ranked) else math.inf

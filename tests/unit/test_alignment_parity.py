"""Compares the alignment, from byte ends to scaled targets, with plain loops and normal equations in fp64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.aligner import Aligner
from align.calibration import StudentRead
from align.head_dim_adapter import KVGeometry
from kvcore.types import TENSORS, BatchKV
from tests.support.alignment_parts import calibrate_on


def naive_ridge(x_fit: np.ndarray, y_fit: np.ndarray, x_out: np.ndarray, y_out: np.ndarray) -> tuple[Any, Any, float]:
    """Solves ridge by normal equations on centred rows and selects the penalty on held-out rows.

    Returns the weight, the bias and the explained variance on the held-out rows.
    """
    best: tuple[float, Any, Any] | None = None
    centre_x, centre_y = x_fit.mean(axis=0), y_fit.mean(axis=0)
    x, y = x_fit - centre_x, y_fit - centre_y
    for exponent in range(-6, 2):
        penalty = 10.0**exponent * np.trace(x.T @ x) / x.shape[1]
        weight = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
        bias = centre_y - centre_x @ weight
        error = float(np.square(x_out @ weight + bias - y_out).sum())
        if best is None or error < best[0]:
            best = (error, weight, bias)
    assert best is not None
    return best[1], best[2], 1 - best[0] / float(np.square(y_out - y_out.mean(axis=0)).sum())


def naive_pairs(kv: BatchKV, read: StudentRead, sinks: int) -> list[tuple[int, int, int]]:
    """Finds the (sample, slot, token) of every pair by comparing the ends one by one."""
    pairs: list[tuple[int, int, int]] = []
    for b in range(len(kv.mask_BM)):
        text = 0
        for token, end in enumerate(read.byte_ends_BT[b].tolist()):
            if end < 0:
                continue
            text += 1
            slots = [m for m, at in enumerate(kv.byte_ends_BLHM[b, 0, 0].tolist()) if at == end and kv.mask_BM[b, m]]
            if text > sinks and slots:
                pairs.append((b, slots[-1], token))
    return pairs


def naive_depth_mix(x_THMD: torch.Tensor, student_layers: int) -> list[torch.Tensor]:
    """Interpolates the teacher's layers at the relative depth of each student layer."""
    layers, mixed = x_THMD.double(), []
    for s in range(student_layers):
        depth = s * (len(layers) - 1) / (student_layers - 1) if student_layers > 1 else len(layers) - 1.0
        low = min(math.floor(depth + 1e-9), len(layers) - 1)
        share = max(depth - low, 0.0)
        mixed.append((1 - share) * layers[low] + share * layers[min(low + 1, len(layers) - 1)])
    return mixed


def random_case(teacher: KVGeometry, student: KVGeometry, seed: int) -> tuple[BatchKV, StudentRead]:
    """Unrelated random K/V with random byte ends. One token of each sample has no known end."""
    generator = torch.Generator().manual_seed(seed)
    samples, slots, tokens = 40, 5, 6

    def normal(geometry: KVGeometry, layers: int, width: int) -> torch.Tensor:
        return torch.randn(samples, layers, geometry.heads, width, geometry.head_dim, generator=generator) + 0.5

    mask = torch.rand(samples, slots, generator=generator) < 0.8
    ends = torch.randint(1, 4, (samples, slots), generator=generator).cumsum(dim=1)
    own_ends = torch.randint(0, 3, (samples, tokens), generator=generator).cumsum(dim=1) + 1
    own_ends[:, 3] = -1
    layers = len(Aligner(teacher, student, layer_map="ratio").layers_needed)
    kv = BatchKV(normal(teacher, layers, slots), normal(teacher, layers, slots), mask, ends[:, None, None])
    read = StudentRead(normal(student, student.layers, tokens), normal(student, student.layers, tokens), own_ends)
    return kv, read


SIZES = st.integers(1, 3)


@settings(max_examples=12)
@given(
    teacher=st.builds(KVGeometry, st.integers(1, 4), SIZES, SIZES),
    student=st.builds(KVGeometry, SIZES, SIZES, SIZES),
    sinks=st.integers(0, 2),
    seed=st.integers(0, 999),
)
def test_alignment_matches_naive_fp64_reference(
    teacher: KVGeometry, student: KVGeometry, sinks: int, seed: int
) -> None:
    kv, read = random_case(teacher, student, seed)
    aligner = calibrate_on(Aligner(teacher, student, layer_map="ratio", sink_tokens=sinks), kv, read)
    pairs = naive_pairs(kv, read, sinks)
    out = np.array([b % 5 == 4 for b, _, _ in pairs])
    assert aligner.report()["rows"] == {"fit": int((~out).sum()), "held_out": int(out.sum())}
    for tensor, x, own, target in zip(
        TENSORS, (kv.k_BLHMD, kv.v_BLHMD), (read.k_BLHTD, read.v_BLHTD), aligner.targets(kv), strict=True
    ):
        assert x is not None
        # Layers outside the plan must have no weight.
        whole = torch.full((len(x), teacher.layers, *x.shape[2:]), 1e6)
        whole[:, list(aligner.layers_needed)] = x
        mixed = [naive_depth_mix(sample, student.layers) for sample in whole]
        for layer in range(student.layers):
            rows = np.array([mixed[b][layer][:, m].flatten().numpy() for b, m, _ in pairs])
            wanted = np.array([own[b, layer, :, t].flatten().double().numpy() for b, _, t in pairs])
            weight, bias, explained = naive_ridge(rows[~out], wanted[~out], rows[out], wanted[out])
            mapped = rows @ weight + bias
            found = np.array([target[b, layer, :, m].flatten().double().numpy() for b, m, _ in pairs])
            np.testing.assert_allclose(found, mapped, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(
                aligner.adapter.explained_variance(tensor)[layer], explained, rtol=1e-6, atol=1e-7
            )
            np.testing.assert_allclose(aligner.scale(tensor)[layer], mapped.std(), rtol=1e-4)
            np.testing.assert_allclose(aligner.variance(tensor)[layer], mapped.var(axis=0).mean(), rtol=1e-4)
            np.testing.assert_allclose(aligner.mean(tensor)[layer].flatten(), mapped.mean(axis=0), atol=1e-4)

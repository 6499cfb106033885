"""Random K/V of a teacher and a student, with a known map between them that calibration has to find."""

from __future__ import annotations

import math

import numpy as np
import torch

from align.aligner import Aligner
from align.calibration import Calibration, LayerCalibration, StudentRead
from align.head_dim_adapter import KVGeometry
from kvcore.types import BatchKV

TEACHER, STUDENT = KVGeometry(5, 2, 4), KVGeometry(3, 3, 2)
MIXING = KVGeometry(4, 2, 4)
SLOT_ENDS, TOKEN_ENDS = (3, 5, 9), (1, 3, 4, 9, -1, 11)
PAIRS = ((0, 1), (2, 3))  # slot, token
CKA_PATH = (0, 1, 4)  # the source layers in TEACHER for the student's layers before the layer map is fitted


def teacher_batch(samples: int, layers: int, seed: int, geometry: KVGeometry = TEACHER) -> BatchKV:
    """Random K/V in three slots that end at SLOT_ENDS; the last slot of every third sample is empty and holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, layers, geometry.heads, len(SLOT_ENDS), geometry.head_dim)
    k, v = 2 * torch.randn(shape, generator=generator) + 1, torch.randn(shape, generator=generator) - 3
    mask = torch.ones(samples, len(SLOT_ENDS), dtype=torch.bool)
    mask[::3, -1] = False
    spoil = ~mask[:, None, None, :, None]
    ends = torch.tensor(SLOT_ENDS).expand(samples, 1, 1, -1).clone()
    return BatchKV(k.masked_fill(spoil, math.nan), v.masked_fill(spoil, math.nan), mask, ends)


def naive_layer_mix(aligner: Aligner, kv: torch.Tensor) -> torch.Tensor:
    """One teacher layer per student layer, by the mapping of the aligner, or by CKA_PATH before it is fitted."""
    if aligner.needs_layer_pass:
        return torch.stack([kv[:, layer] for layer in CKA_PATH], dim=1)
    order = {layer: place for place, layer in enumerate(aligner.layers_needed)}
    rows = [sum(weight * kv[:, order[layer]] for layer, weight in row) for row in aligner.mapper.get_mapping().values()]
    return torch.stack(rows, dim=1)  # type: ignore[arg-type]


def student_read(aligner: Aligner, kv: BatchKV, seed: int, noise: float = 0.0) -> StudentRead:
    """Student K/V: at paired tokens, a linear map of the teacher's, different in each layer; noise at other tokens."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.Generator().manual_seed(7)
    samples = len(kv.mask_BM)
    read: dict[str, torch.Tensor] = {}
    for tensor, x in (("k", kv.k_BLHMD), ("v", kv.v_BLHMD)):
        assert x is not None
        mixed = naive_layer_mix(aligner, x)
        out = 9 * torch.randn(
            samples, STUDENT.layers, STUDENT.heads, len(TOKEN_ENDS), STUDENT.head_dim, generator=generator
        )
        for layer in range(STUDENT.layers):
            weight = torch.randn(TEACHER.features, STUDENT.features, generator=truth)
            for slot, token in PAIRS:
                rows = mixed[:, layer, :, slot].flatten(1) @ weight - 2.0
                rows = rows + noise * torch.randn(rows.shape, generator=generator)
                rows = rows.unflatten(1, (STUDENT.heads, STUDENT.head_dim))
                out[:, layer, :, token] = torch.where(rows.isnan(), out[:, layer, :, token], rows)
        read[tensor] = out
    return StudentRead(read["k"], read["v"], torch.tensor(TOKEN_ENDS).expand(samples, -1))


def calibrated(aligner: Aligner, samples: int = 200, noise: float = 0.0) -> tuple[Aligner, BatchKV, StudentRead]:
    kv = teacher_batch(samples, len(aligner.layers_needed), seed=1, geometry=aligner.teacher)
    read = student_read(aligner, kv, seed=2, noise=noise)
    calibrate_on(aligner, kv, read)
    return aligner, kv, read


def calibrate_on(aligner: Aligner, kv: BatchKV, read: StudentRead | None = None) -> Aligner:
    """Calibrate on one batch."""
    numbers = torch.arange(len(kv.mask_BM))
    if aligner.needs_layer_pass:
        assert read is not None
        layers = LayerCalibration(aligner)
        layers.update(kv, numbers, read)
        layers.finish()
    calibration = Calibration(aligner)
    calibration.update(kv, numbers, read)
    calibration.finish()
    return aligner


def paired_rows(kv: BatchKV, x_BLHMD: torch.Tensor, place: int) -> np.ndarray:
    """The rows [N,L,F] that calibration uses, computed one by one: of slots (`place` 0) or of tokens (`place` 1)."""
    rows = [
        x_BLHMD[b, :, :, pair[place]].detach().flatten(1)
        for b in range(len(kv.mask_BM))
        for pair in PAIRS
        if kv.mask_BM[b, pair[0]]
    ]
    return torch.stack(rows).double().numpy()

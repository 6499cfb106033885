"""Tests of the errors that `benchmarks.codec` reports, with an independent reference in fp64."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.codec import Texts, error_together, measure
from kvcore.plan import CodecSpec
from kvcore.tensors.codec import decode, encode
from kvcore.types import TensorKind

LAYERS, HEADS, DIM = 3, 2, 64


def texts_of(kind: TensorKind, scale: float, seed: int) -> Texts:
    generator = torch.Generator().manual_seed(seed)
    rows = [scale * torch.randn(LAYERS, HEADS, slots, DIM, generator=generator) for slots in (5, 9)]
    norm_L = torch.cat(rows, dim=2).double().flatten(1).norm(dim=1)
    return Texts(kind, rows, norm_L, norm_L)


def test_errors_equal_those_of_a_loop_over_layers() -> None:
    spec = CodecSpec(name="int4")
    both = [texts_of("k", 10.0, 0), texts_of("v", 1.0, 1)]
    found = [measure(texts, spec) for texts in both]
    together, alone = [], []
    for layer in range(LAYERS):
        errors, norms = [], []
        for texts in both:
            error = norm = 0.0
            for x_LHMD in texts.x_LHMD:
                x_HMD = x_LHMD[layer]
                y_HMD = decode(encode(x_HMD[None], texts.kind, spec).parts, texts.kind, spec)[0]
                error += float(((y_HMD.double() - x_HMD.double()) ** 2).sum())
                norm += float((x_HMD.double() ** 2).sum())
            errors.append(error)
            norms.append(norm)
        together.append(np.sqrt(sum(errors) / sum(norms)))
        alone.append(np.sqrt(errors[1] / norms[1]))
    np.testing.assert_allclose(error_together(both, found), np.mean(together), rtol=1e-6)
    np.testing.assert_allclose(found[1].figures["error"], np.mean(alone), rtol=1e-6)

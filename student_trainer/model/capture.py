"""Captures the student's content keys and values, with their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from kvcore.tensors.projections import KVProjection, kv_projections
from kvcore.types import Tensor


class KVCapture:
    """The K/V of one forward pass, layer by layer."""

    def __init__(self) -> None:
        self.k_BHTD: list[Tensor] = []
        self.v_BHTD: list[Tensor] = []

    def columns(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """k_BLHMD and v_BLHMD at the sequence positions start..stop, in fp32."""
        k_BLHMD = torch.stack([k[:, :, start:stop] for k in self.k_BHTD], dim=1)
        v_BLHMD = torch.stack([v[:, :, start:stop] for v in self.v_BHTD], dim=1)
        return k_BLHMD.float(), v_BLHMD.float()


@contextmanager
def capture_kv(model: nn.Module) -> Iterator[KVCapture]:
    """Captures every layer's K/V of the forward pass run inside the block. The model is restored when the block ends.

    Gradients flow from the captured K/V into the model, also with non-reentrant gradient checkpointing and every ZeRO
    stage. Run exactly one forward pass inside the block.

    Raises:
        UnsupportedModelError: the model's keys and values can't be read exactly.
    """
    capture = KVCapture()
    projections = kv_projections(model)
    with ExitStack() as undo:
        for projection in projections:
            for module, kept in ((projection.key, capture.k_BHTD), (projection.value, capture.v_BHTD)):
                undo.callback(module.register_forward_hook(partial(_keep, projection, kept)).remove)
        yield capture
    assert len(capture.k_BHTD) == len(capture.v_BHTD) == len(projections), "run exactly one forward pass"
    # Reentrant checkpointing computes the same values, but silently cuts the gradient.
    assert not torch.is_grad_enabled() or capture.k_BHTD[0].requires_grad, "captured keys carry no gradient"


def _keep(projection: KVProjection, kept: list[Tensor], _module: nn.Module, _inputs: Any, output: Tensor) -> None:
    kept.append(projection.heads_first(output))

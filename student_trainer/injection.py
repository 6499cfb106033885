"""Puts K/V from elsewhere into a forward pass of the student, in place of its own at chosen columns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from kvcore.projections import KVProjection, kv_projections
from kvcore.types import Tensor


@dataclass(frozen=True, slots=True)
class Injection:
    """Content K/V for some columns of a sequence, where `mask_BM` is True; the student keeps its own elsewhere.

    Keys are un-rotated: the model turns them to the positions of its columns, as it does its own.
    """

    columns: slice
    k_BLHMD: Tensor
    v_BLHMD: Tensor
    mask_BM: Tensor


@contextmanager
def inject_kv(model: nn.Module, injection: Injection) -> Iterator[None]:
    """Inside the block every layer's attention sees the injected K/V; gradients flow into them. Restored on leaving.

    Raises:
        UnsupportedModelError: the model's keys and values can't be replaced exactly.
    """
    handles: list[Any] = []
    for projection in kv_projections(model):
        for module, x_BLHMD in ((projection.key, injection.k_BLHMD), (projection.value, injection.v_BLHMD)):
            replace = partial(_replaced, projection, injection, x_BLHMD[:, projection.layer])
            handles.append(
                module.register_forward_hook(lambda _module, _inputs, output, replace=replace: replace(output))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replaced(projection: KVProjection, injection: Injection, x_BHMD: Tensor, output: Tensor) -> Tensor:
    """A projection's output with some columns replaced, in the form that the module gave."""
    own_BHTD = projection.heads_first(output)
    before, own_BHMD, after = (
        own_BHTD[:, :, : injection.columns.start],
        own_BHTD[:, :, injection.columns],
        own_BHTD[:, :, injection.columns.stop :],
    )
    kept = injection.mask_BM[:, None, :, None]
    # Where nothing is injected x may hold anything, which must not reach the gradient either.
    x_BHMD = x_BHMD.masked_fill(~kept, 0.0).to(output.dtype)
    mixed_BHMD = torch.where(kept, x_BHMD, own_BHMD)
    return projection.as_output(torch.cat([before, mixed_BHMD, after], dim=2), output)

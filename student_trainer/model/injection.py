"""Puts K/V from elsewhere into a forward pass of the student, in place of its own at chosen columns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from kvcore.tensors.projections import KVProjection, kv_projections
from kvcore.types import Tensor


@dataclass(frozen=True, slots=True)
class Injection:
    """Content K/V for the columns of a sequence where `mask_BT` is True; the student keeps its own elsewhere.

    Keys are un-rotated: the model turns them to the positions of its columns, as it does its own.
    """

    k_BLHTD: Tensor
    v_BLHTD: Tensor
    mask_BT: Tensor


@contextmanager
def inject_kv(model: nn.Module, injection: Injection) -> Iterator[None]:
    """Inside the block every layer's attention sees the injected K/V; gradients flow into them. Restored on leaving.

    Raises:
        UnsupportedModelError: the model's keys and values can't be replaced exactly.
    """
    handles: list[Any] = []
    for projection in kv_projections(model):
        for module, x_BLHTD in ((projection.key, injection.k_BLHTD), (projection.value, injection.v_BLHTD)):
            replace = partial(_replaced, projection, injection.mask_BT, x_BLHTD[:, projection.layer])
            handles.append(
                module.register_forward_hook(lambda _module, _inputs, output, replace=replace: replace(output))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replaced(projection: KVProjection, mask_BT: Tensor, x_BHTD: Tensor, output: Tensor) -> Tensor:
    """A projection's output with some columns replaced, in the form that the module gave."""
    kept = mask_BT[:, None, :, None]
    # Where nothing is injected x may hold anything, which must not reach the gradient either.
    x_BHTD = x_BHTD.masked_fill(~kept, 0.0).to(output.dtype)
    return projection.as_output(torch.where(kept, x_BHTD, projection.heads_first(output)), output)

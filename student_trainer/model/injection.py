"""Replaces the student's K/V at chosen positions of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from kvcore.tensors.projections import KVProjection, kv_projections
from kvcore.types import Tensor


@contextmanager
def inject_kv(model: nn.Module, k_BLHTD: Tensor, v_BLHTD: Tensor, mask_BT: Tensor) -> Iterator[None]:
    """Inside the block every layer's attention reads the given K/V where `mask_BT` is True; gradients flow into them.

    Keys are content keys: the model rotates them to their positions as it does its own. The model is restored when the
    block ends.

    Raises:
        UnsupportedModelError: the model's keys and values can't be replaced exactly.
    """
    with ExitStack() as undo:
        for projection in kv_projections(model):
            for module, x_BLHTD in ((projection.key, k_BLHTD), (projection.value, v_BLHTD)):
                replace = partial(_replaced, projection, mask_BT, x_BLHTD[:, projection.layer])
                undo.callback(module.register_forward_hook(replace).remove)
        yield


def _replaced(
    projection: KVProjection, mask_BT: Tensor, x_BHTD: Tensor, _module: nn.Module, _inputs: Any, output: Tensor
) -> Tensor:
    """A projection's output with some positions replaced, in the module's own layout."""
    kept = mask_BT[:, None, :, None]
    # x may hold anything where nothing is injected, NaN included, which must not reach the gradient either.
    x_BHTD = x_BHTD.masked_fill(~kept, 0.0).to(output.dtype)
    return projection.as_output(torch.where(kept, x_BHTD, projection.heads_first(output)), output)

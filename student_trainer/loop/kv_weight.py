"""`loss.kv_weight: auto`: the weight at which the gradient of the KV loss is as long as that of the cross-entropy.

The effect of a fixed weight depends on models, layers and slots. With a separate teacher the KV gradient was measured
at 0.2 % of the cross-entropy's, and the KV loss had no effect.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from kvcore.errors import FieldError
from kvcore.types import Tensor


def auto_kv_weight(model: nn.Module, batches: Iterable[Any], ratio: float, reduce: Callable[[Tensor], object]) -> float:
    """The weight w with w · mean ‖∇ kv_objective‖ = ratio · mean ‖∇ ce_loss‖, means over micro-batches and ranks.

    Only parameters that both losses train count: not a head that only the cross-entropy trains, nor a regressor that
    only the KV loss trains. The model runs in training mode. Its modes and the random state are restored, and no
    `.grad` is written. Call it before an engine partitions the parameters. It needs memory for one gradient of the
    student.

    Args:
        model: `model(batch)` returns a dict with the scalars `ce_loss` and `kv_objective`.
        batches: this rank's micro-batches, already fetched: a rank that failed alone would leave the others waiting.
        ratio: length of the weighted KV gradient, as a multiple of the cross-entropy's.
        reduce: sums a small tensor over ranks in place, as `dist.all_reduce` does; every rank gets the same weight.

    Raises:
        FieldError: one of the gradients is zero or not finite, on every rank alike.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sums = torch.zeros(2, dtype=torch.float64, device=parameters[0].device)
    with _training_undisturbed(model):
        for batch in batches:
            sums += _gradient_norms(model(batch), parameters)
    reduce(sums)
    cross_entropy, kv = sums.tolist()
    for name, length in (("KV loss", kv), ("cross-entropy", cross_entropy)):
        if not (math.isfinite(length) and length > 0):
            raise FieldError(
                "loss.kv_weight",
                f"'auto' needs gradients that are finite and not 0, but the gradient of the {name} has the norm "
                f"{length} over the first micro-batches; check the alignment and the data, or set a number",
            )
    return ratio * cross_entropy / kv


def _gradient_norms(losses: dict[str, Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
    """[2]: lengths of the gradients of cross-entropy and KV loss, over the parameters that have both."""
    # One after the other, so that only one gradient is held at a time.
    kv = _squared_lengths(losses["kv_objective"], parameters, retain_graph=True)
    cross_entropy = _squared_lengths(losses["ce_loss"], parameters, retain_graph=False)
    both = [torch.stack([a, b]) for a, b in zip(cross_entropy, kv, strict=True) if a is not None and b is not None]
    return torch.stack(both).sum(dim=0).sqrt() if both else torch.zeros(2, device=parameters[0].device)


def _squared_lengths(loss: Tensor, parameters: Sequence[nn.Parameter], *, retain_graph: bool) -> list[Tensor | None]:
    gradients = torch.autograd.grad(loss, parameters, retain_graph=retain_graph, allow_unused=True)
    return [None if g is None else torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in gradients]


@contextlib.contextmanager
def _training_undisturbed(model: nn.Module) -> Iterator[None]:
    """Training mode; restores each module's mode and the random state at the end."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices=devices):
        model.train()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

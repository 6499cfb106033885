"""A student that ZeRO-3 partitions over the ranks while it is loaded, and passes through it before there is an engine.

No rank but the one that reads the weights from disk ever holds the whole student. DeepSpeed's engine gathers parameters
for the passes of training. Before it exists, `gathered_in_passes` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from kvcore.types import Tensor


@contextmanager
def partitioned_loading(dtype: str) -> Iterator[None]:
    """Inside the block, transformers' `from_pretrained` keeps only this rank's partition of each parameter.

    Rank 0 reads the weights. All ranks must enter it. `dtype`: of the student.
    """
    from transformers.integrations.deepspeed import (  # noqa: PLC0415 - imports DeepSpeed
        HfDeepSpeedConfig,
        unset_hf_deepspeed_config,
    )

    settings = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed demands a batch size, which loading does not use.
        "bf16": {"enabled": dtype == "bf16"},
        # The other linear layer replaces torch's in the whole process.
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
    }
    kept = HfDeepSpeedConfig(settings)  # transformers has only a weak reference to it.
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del kept


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 holds this parameter."""
    return hasattr(parameter, "ds_id")


def whole_numel(parameter: nn.Parameter) -> int:
    """The number of elements of a parameter, partitioned or not."""
    return parameter.ds_numel if is_partitioned(parameter) else parameter.numel()  # type: ignore[attr-defined]


def partition(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """This rank's partition of a whole value for a partitioned parameter, padded like DeepSpeed's last partition."""
    size: int = parameter.partition_numel()  # type: ignore[attr-defined]
    flat = value.flatten()
    padded = nn.functional.pad(flat, (0, size * dist.get_world_size() - flat.numel()))
    return padded[size * dist.get_rank() : size * (dist.get_rank() + 1)]


@torch.no_grad()
def set_value(parameter: nn.Parameter, value: Tensor) -> None:
    """Sets a parameter that no engine has yet, partitioned or not, to a whole value."""
    if is_partitioned(parameter):
        held: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        held.copy_(partition(parameter, value))
    else:
        parameter.copy_(value)


@contextmanager
def gathered_in_passes(module: nn.Module, held: nn.Module | None = None) -> Iterator[None]:
    """Inside the block, partitioned parameters are whole while their module runs, in forward and backward passes.

    It changes nothing if nothing is partitioned. All ranks must run the same passes, before the engine is created.

    Args:
        module: what runs.
        held: a part of it that stays whole, so that the ranks may run it different numbers of times.
    """
    kept = [p for p in held.parameters() if is_partitioned(p)] if held is not None else []
    owned = [
        (part, [p for p in part.parameters(recurse=False) if is_partitioned(p) and not any(p is one for one in kept)])
        for part in module.modules()
    ]
    gathered = _Gathered()
    with ExitStack() as undo:
        if kept:
            gathered.gather(kept)
            undo.callback(gathered.release, kept)
        for part, parameters in owned:
            if parameters:
                before = part.register_forward_pre_hook(partial(gathered.gather_for, parameters))
                after = part.register_forward_hook(partial(gathered.release_for, parameters), always_call=True)
                undo.callback(before.remove)
                undo.callback(after.remove)
        if any(parameters for _, parameters in owned):
            # Autograd would keep every module's parameters whole until the backward pass.
            undo.enter_context(saved_tensors_hooks(gathered.pack, gathered.unpack))
        yield


@dataclass(frozen=True, slots=True)
class _View:
    """A view of a partitioned parameter, without its data."""

    parameter: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Gathered:
    """The partitioned parameters that are whole at the moment, by the address of their memory."""

    def __init__(self) -> None:
        self._whole: dict[int, nn.Parameter] = {}
        self._frozen: set[nn.Parameter] = set()

    def gather(self, parameters: list[Any]) -> None:
        """Makes parameters whole. All ranks must call it."""
        parameters[0].all_gather(param_list=list(parameters))
        self._whole.update({_address(parameter): parameter for parameter in parameters})

    def release(self, parameters: list[Any]) -> None:
        """Keeps only this rank's partitions."""
        for parameter in parameters:
            self._whole.pop(_address(parameter), None)
        parameters[0].partition(param_list=list(parameters))

    def gather_for(self, parameters: list[Any], *_: Any) -> None:
        """Makes a module's parameters whole for its forward pass."""
        self.gather(parameters)
        for parameter in parameters:
            if not parameter.requires_grad:
                # Gradient checkpointing would keep the parameter itself in place of its data, which is released.
                self._frozen.add(parameter)
                parameter.requires_grad_()

    def release_for(self, parameters: list[Any], *_: Any) -> None:
        """The end of the forward pass."""
        for parameter in parameters:
            parameter.requires_grad_(parameter not in self._frozen)
        self.release(parameters)

    def pack(self, tensor: Tensor) -> Tensor | _View:
        """What autograd keeps of a tensor for the backward pass."""
        parameter = self._whole.get(_address(tensor))
        if parameter is None:
            return tensor
        return _View(parameter, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, kept: Tensor | _View) -> Tensor:
        """The tensor, from what autograd kept of it."""
        if not isinstance(kept, _View):
            return kept
        held = _address(kept.parameter) in self._whole
        if not held:
            self.gather([kept.parameter])
        tensor = kept.parameter.detach().as_strided(kept.size, kept.stride, kept.offset)
        if held:
            return tensor
        tensor = tensor.clone()
        self.release([kept.parameter])
        return tensor


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

"""The only module that uses DeepSpeed: process group, engine, and its full state without pickle."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from kvcore.types import Tensor
from student_trainer.config import TrainConfig
from student_trainer.launching.processes import free_port
from student_trainer.model.partitions import is_partitioned, partition, whole_numel

MOMENTS = ("exp_avg", "exp_avg_sq")


def start(seed: int) -> tuple[int, int]:
    """Joins the process group of torchrun or deepspeed, or makes one of a single process.

    Returns:
        rank and world size.
    """
    deepspeed = _import_deepspeed()
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(seed)
    return dist.get_rank(), dist.get_world_size()


def stop() -> None:
    """Leaves the process group. `start` can make a new one afterwards."""
    comm = _import_deepspeed().comm
    if comm.is_initialized():
        # DeepSpeed keeps references to groups; only its own function releases them.
        comm.destroy_process_group()
    elif dist.is_initialized():
        dist.destroy_process_group()


def device() -> torch.device:
    """This rank's device."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _import_deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # In every step DeepSpeed calls functions that torch has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # Otherwise start-up on the CPU compiles a shared-memory op for minutes, and fails without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class Engine:
    """A module under DeepSpeed ZeRO.

    Args:
        module: the module to train; its forward pass returns a dict of scalar losses with the key `loss`.
        config: the run's configuration.
        accumulation: micro-batches per optimiser step on this rank.
    """

    def __init__(self, module: nn.Module, config: TrainConfig, accumulation: int) -> None:
        deepspeed = _import_deepspeed()
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # Fused: one pass over the memory of each parameter. On a CPU it takes an eighth of the time.
        optimizer = torch.optim.AdamW(trained, lr=config.optim.lr, weight_decay=config.optim.weight_decay, fused=True)
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, model_parameters=trained, config=_settings(config, accumulation, trained)
        )
        self.module: nn.Module = self._engine.module

    def micro_step(self, batch: Any) -> dict[str, Tensor]:
        """Forward and backward pass, and the optimiser's step after the last micro-batch of a step."""
        losses = self._engine(batch)
        self._engine.backward(losses["loss"])
        self._engine.step()
        return losses

    def close(self) -> None:
        """Frees module and optimiser, so that a process that trains again holds only one of each."""
        self._engine.destroy()
        del self._engine, self.module
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of every parameter."""
        for group in self._inner().param_groups:
            group["lr"] = lr

    def gradient_norm(self) -> float | None:
        """The norm of all ranks' gradients at the last step, before clipping; the same on every rank.

        Infinite if DeepSpeed skipped the step. None if DeepSpeed keeps no norm: stage 0 in fp32.
        """
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def is_finite(self) -> bool:
        """Whether this rank's optimiser holds only finite parameters and moments."""
        state = self._inner().state
        return all(
            bool(tensor.isfinite().all())
            for held in self._held()
            for tensor in (held, *(state[held][moment] for moment in MOMENTS if held in state))
        )

    def _held(self) -> Iterator[Tensor]:
        """The fp32 tensors that the optimiser updates: parameters, or this rank's partitions of them."""
        # ZeRO-3 gives its partitions to the optimiser only during a step; in other stages the optimiser keeps them.
        partitions = getattr(self._engine.optimizer, "fp32_partitioned_groups_flat", None)
        if partitions:
            return iter(partitions)
        return (held for group in self._inner().param_groups for held in group["params"])

    def _inner(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters with their names, in a fixed order."""
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    def weights(self) -> dict[str, Tensor]:
        """On rank 0 every whole trained parameter, in fp32 on the CPU; {} elsewhere. All ranks must call it."""
        return self._gather(None)

    def frozen_weights(self, prefix: str) -> dict[str, Tensor]:
        """On rank 0 every whole parameter that is not trained, on the CPU; {} elsewhere. All ranks must call it.

        `prefix`: the start of the parameters' names.
        """
        gathered: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad or not name.startswith(prefix):
                continue
            with _whole(parameter):
                if dist.get_rank() == 0:
                    gathered[name] = parameter.detach().cpu().clone()
        return gathered

    def moments(self) -> dict[str, Tensor]:
        """On rank 0 the optimiser's whole moments as `<parameter>/<moment>`, on the CPU. All ranks must call it."""
        return {f"{name}/{moment}": x for moment in MOMENTS for name, x in self._gather(moment).items()}

    def _gather(self, moment: str | None) -> dict[str, Tensor]:
        gathered: dict[str, Tensor] = {}
        for name, parameter in self.trained_parameters():
            full = self._full(parameter, moment)
            if dist.get_rank() == 0:
                gathered[name] = full.detach().float().cpu().clone()
        return gathered

    def _full(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if is_partitioned(parameter) or hasattr(parameter, "_hp_mapping"):
            full = (
                safe_get_full_fp32_param(parameter)
                if moment is None
                else safe_get_full_optimizer_state(parameter, moment)
            )
            assert full is not None
            return full
        return parameter if moment is None else self._inner().state[parameter][moment]

    def restore(self, weight: Callable[[str], Tensor], moment: Callable[[str], Tensor], steps: int) -> None:
        """Sets fp32 parameters and optimiser state to those saved after `steps` steps, with any number of ranks.

        The module must have had the same weights when this engine was created.

        Args:
            weight: reads a whole parameter by its name.
            moment: reads a whole moment by `<parameter>/<moment>`.
            steps: the optimiser's steps so far.
        """
        self._prime_optimizer(steps)
        for name, parameter in self.trained_parameters():
            self._set(parameter, None, weight(name))
            for kind in MOMENTS:
                self._set(parameter, kind, moment(f"{name}/{kind}"))

    def _prime_optimizer(self, steps: int) -> None:
        """Creates the state that AdamW creates only at its first step, so that it can be set."""
        inner = self._inner()
        for held in self._held():
            # The fused optimiser wants its step count where the parameter is.
            inner.state[held] = {"step": torch.tensor(float(steps), device=held.device)} | {
                name: torch.zeros_like(held) for name in MOMENTS
            }
        link = getattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def _set(self, parameter: nn.Parameter, moment: str | None, value: Tensor) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        value = value.to(parameter.device)
        if is_partitioned(parameter):
            part = partition(parameter, value)
            if moment is None:
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, moment)
        elif hasattr(parameter, "_hp_mapping"):
            if moment is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, moment)
        elif moment is None:
            parameter.data.copy_(value)
        else:
            self._inner().state[parameter][moment].copy_(value)


def _whole(parameter: nn.Parameter) -> contextlib.AbstractContextManager[None]:
    """Makes a parameter whole inside the block, where ZeRO-3 keeps only its partitions. All ranks must enter it."""
    if not is_partitioned(parameter):
        return contextlib.nullcontext()
    return _import_deepspeed().zero.GatheredParameters([parameter])


def _settings(config: TrainConfig, accumulation: int, trained: list[nn.Parameter]) -> dict[str, Any]:
    # DeepSpeed allocates whole buckets up front; its default of 5e8 elements is meant for far larger models.
    # A power of two, since a bucket must divide into the ranks' aligned partitions.
    bucket = max(2**16, min(2**28, 1 << sum(map(whole_numel, trained)).bit_length()))
    offloaded = {"offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}
    return {
        "train_batch_size": config.run.global_batch,
        "train_micro_batch_size_per_gpu": config.run.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.max_grad_norm,
        "bf16": {"enabled": config.student.dtype == "bf16"},
        "zero_optimization": {
            "stage": config.run.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": torch.cuda.is_available(),
            **(offloaded if config.run.offload_optimizer else {}),
        },
        "zero_allow_untested_optimizer": True,
        # torch's AdamW steps on the CPU, too; DeepSpeed's own has to be compiled on each machine.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }

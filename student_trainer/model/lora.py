"""LoRA adapters (arXiv 2106.09685) of a frozen student, through peft.

The student stays a transformers model: peft replaces linear layers in place, so hooks on k_proj and v_proj see what
base and adapter give together.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from kvcore.errors import FieldError, did_you_mean
from kvcore.types import Tensor
from student_trainer.config import LoraConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# peft's name of the only adapter, and the start of every name in its files.
_NAME, _PREFIX = "default", "base_model.model."
_PARTS = ("base_layer", f"lora_A.{_NAME}", f"lora_B.{_NAME}")


def add_lora(lm: PreTrainedModel, settings: LoraConfig, base: str, seed: int) -> None:
    """Freezes the model and adds adapters to it in place. They change nothing until they are trained.

    Args:
        lm: the model.
        settings: rank, scale, dropout and the layers that get an adapter.
        base: the directory or hub id of the model, which the saved adapter names.
        seed: of the adapters' initial weights, so that all ranks have the same.

    Raises:
        FieldError: a layer to adapt does not exist.
    """
    from peft import LoraConfig as PeftConfig  # noqa: PLC0415 - slow to import
    from peft import inject_adapter_in_model  # noqa: PLC0415

    names = _linear_layers(lm, settings.target_modules)
    config = PeftConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=names,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )
    lm.requires_grad_(requires_grad=False)
    # No devices: otherwise each rank would open a context on every GPU of its machine.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, lm)
    # Otherwise nothing before the first adapter has a gradient, which captured keys and checkpointing need.
    lm.enable_input_require_grads()


def _linear_layers(lm: PreTrainedModel, wanted: tuple[str, ...] | None) -> list[str]:
    """The full names of the linear layers without the head whose own names are wanted, or of all.

    Raises:
        FieldError: there is no linear layer of a wanted name.
    """
    head = lm.get_output_embeddings()
    linear = [name for name, module in lm.named_modules() if isinstance(module, nn.Linear) and module is not head]
    known = sorted({_own_name(name) for name in linear})
    for name in wanted or ():
        if name not in known:
            problem = f"the student has no linear layer '{name}'; it has {', '.join(known)}{did_you_mean(name, known)}"
            raise FieldError("student.lora.target_modules", problem)
    return [name for name in linear if wanted is None or _own_name(name) in wanted]


def _own_name(name: str) -> str:
    return name.rpartition(".")[2]


def _adapted(lm: nn.Module) -> list[tuple[str, Any]]:
    """The layers with an adapter, by name."""
    return [(name, module) for name, module in lm.named_modules() if hasattr(module, "lora_A")]


def merged(lm: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of the model without adapters: each adapted weight is W + scale x B A, computed in fp32.

    Args:
        lm: the model with adapters; its own tensors are not read.
        state: its whole tensors by name.
    """
    plain = dict(state)
    for name, layer in _adapted(lm):
        weight, a_RI, b_OR = (plain.pop(f"{name}.{part}.weight").float() for part in _PARTS)
        plain[f"{name}.weight"] = weight + layer.scaling[_NAME] * (b_OR @ a_RI)
        if layer.base_layer.bias is not None:
            plain[f"{name}.bias"] = plain.pop(f"{name}.base_layer.bias")
    return plain


def save_adapter(lm: PreTrainedModel, state: dict[str, Tensor], directory: Path) -> None:
    """Writes the adapter alone, in the format of peft. `state`: the model's whole tensors by name."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{_PREFIX}{name}.{part}.weight": state[f"{name}.{part}.{_NAME}.weight"].contiguous()
        for name, _ in _adapted(lm)
        for part in ("lora_A", "lora_B")
    }
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config: Any = lm.peft_config
    config[_NAME].save_pretrained(str(directory))

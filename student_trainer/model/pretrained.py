"""Loads a causal language model, and refuses one with missing weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from kvcore.errors import FieldError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTypeName = Literal["auto", "fp32", "bf16"]
_DTYPES: dict[str, torch.dtype | str] = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16}


def load_pretrained(path: str, dtype: DTypeName, field: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model on the CPU, and its tokenizer.

    Args:
        path: a directory or hub id that transformers loads.
        dtype: of the weights; `auto` keeps the saved one.
        field: the name of `path` in errors.

    Raises:
        FieldError: the model cannot be loaded, or weights are missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging  # noqa: PLC0415 - slow to import

    logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            path, dtype=_DTYPES[dtype], attn_implementation="sdpa", use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        step = "give a directory that holds a model, or a hub id that this machine can fetch"
        raise FieldError(field, f"cannot load '{path}': {reason} Next: {step}") from error
    lm, report = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    if report["missing_keys"]:
        # transformers initialises them at random.
        missing = sorted(report["missing_keys"])
        raise FieldError(field, f"'{path}' lacks {len(missing)} weights of its model: {missing[0]}, ...")
    return lm, tokenizer


def find_device(name: str, field: str) -> torch.device:
    """Returns the device of a name: auto, cpu, cuda or cuda:N. `field`: the field that errors name.

    Raises:
        FieldError: the device does not exist.
    """
    found = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if found else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= found:
        raise FieldError(field, f"'{name}' does not exist; CUDA devices found: {found}")
    return device

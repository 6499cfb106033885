"""Loading a causal language model so that nothing of it is made up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from kvcore.errors import FieldError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTypeName = Literal["auto", "fp32", "bf16"]
_DTYPES: dict[str, torch.dtype | str] = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16}


def load_pretrained(path: str, dtype: DTypeName, field: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model on the CPU, with its tokenizer.

    Args:
        path: a directory or hub id that transformers loads.
        dtype: of the weights; `auto` as they were saved.
        field: what an error calls `path`.

    Raises:
        FieldError: it cannot be loaded, or lacks weights.
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
        # transformers fills them with random values.
        missing = sorted(report["missing_keys"])
        raise FieldError(field, f"'{path}' lacks {len(missing)} weights of its model: {missing[0]}, ...")
    return lm, tokenizer


def find_device(name: str, field: str) -> torch.device:
    """The device of that name: auto, cpu, cuda or cuda:N.

    Raises:
        FieldError: it is not there; `field` is what the error calls it.
    """
    found = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if found else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= found:
        raise FieldError(field, f"there is no '{name}' here; CUDA devices found: {found}")
    return device

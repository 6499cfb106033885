"""Loads a student, or another causal language model, and finds the device to run it on."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Literal

import torch

from kvcore.errors import FieldError
from kvcore.models.loading import ModelSource, check_vocabulary, find_model
from student_trainer.model.partitions import partitioned_loading

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTypeName = Literal["auto", "fp32", "bf16"]
_DTYPES: dict[str, torch.dtype | str] = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16}


def load_pretrained(
    path: str, dtype: DTypeName, field: str, *, trained: bool = False, partitioned: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model on the CPU, and its tokenizer. Of a latent student this is the backbone, without the latents.

    Args:
        path: a directory or hub id of a transformers model or of a latent student.
        dtype: of the weights; `auto` keeps the saved one.
        field: the name of `path` in errors.
        trained: whether it is loaded to be trained, which quantised models cannot be.
        partitioned: whether each rank keeps only its partition, as ZeRO-3 has it. All ranks must call it then.

    Raises:
        FieldError: the model cannot be loaded, or weights are missing.
        UnsupportedModelError: it is no causal language model.
    """
    from transformers import logging  # noqa: PLC0415 - slow to import

    logging.disable_progress_bar()
    source = find_model(path, field, latents_apart=True)
    config = source.config()
    if trained:
        _check_not_quantised(source, config)
    tokenizer = source.tokenizer()
    if partitioned:
        # transformers does not report unexpected names and other shapes when it partitions. This reads no weights.
        source.causal_lm(source.config(), device_map="meta")
    with partitioned_loading(dtype) if partitioned else contextlib.nullcontext():
        lm = source.causal_lm(config, dtype=_DTYPES[dtype], attn_implementation="sdpa")
    check_vocabulary(source, tokenizer, lm)
    return lm, tokenizer


def _check_not_quantised(source: ModelSource, config: PreTrainedConfig) -> None:
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
            raise FieldError(
                source.field,
                f"'{source.name}' is quantised ({method or 'quantization_config in its config.json'}), and quantised "
                "weights cannot be trained; give the original model in 16 or 32 bits",
            )


def set_special_tokens(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes the tokenizer's special tokens those of the model, and drops all other settings of generation.

    Training teaches the tokenizer's end of sequence. Another end token, a repetition penalty or sampling would change
    the answers of the saved model.
    """
    from transformers import GenerationConfig  # noqa: PLC0415 - slow to import

    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    for config in (lm.config, lm.config.get_text_config()):
        config.bos_token_id, config.eos_token_id = bos, eos
        # transformers gives the pad token's embedding no gradient, which the end of sequence needs.
        config.pad_token_id = None if pad == eos else pad
    lm.generation_config = GenerationConfig(
        bos_token_id=bos, eos_token_id=eos, pad_token_id=eos if pad is None else pad
    )


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

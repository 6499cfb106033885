"""Refuses models of other kinds than decoder-only language models, before their tokenizer and weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from kvcore.errors import FieldError, did_you_mean
from kvcore.models.backbone import read_config
from kvcore.models.files import CONFIG, model_config
from kvcore.models.latent_folder import backbone_tree
from kvcore.tensors.projections import kv_projections, unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MEDIA = ("vision", "audio", "image", "speech", "video")


def check_kind(directory: Path, name: str, field: str) -> None:
    """Checks that a directory holds a decoder-only language model with standard attention.

    A latent student is checked by its backbone. A model that brings its own Python code is not checked here.

    Args:
        directory: of the model.
        name: the directory or hub id, as the user wrote it.
        field: the field of `name` in errors.

    Raises:
        FieldError: the directory has no configuration that transformers knows.
        UnsupportedModelError: it holds a model of another kind.
    """
    tree = backbone_tree(model_config(directory, name, field))
    if "auto_map" not in tree:
        _check_model_type(tree, name, field)
        _check_architecture(directory, name, field)


def _check_model_type(tree: dict[str, Any], name: str, field: str) -> None:
    # Imports of transformers are slow, so they are inside the functions of this module.
    from transformers import CONFIG_MAPPING, __version__  # noqa: PLC0415

    model_type = tree.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise FieldError(
            field,
            f"the {CONFIG} of '{name}' has no model_type, which says how to build the model; next: copy {CONFIG} again "
            "from the model that it comes from",
        )
    if model_type not in CONFIG_MAPPING:
        raise FieldError(
            field,
            f"the {CONFIG} of '{name}' has the model_type '{model_type}', which transformers {__version__} does not "
            f"know; next: update transformers if the model is newer{did_you_mean(model_type, list(CONFIG_MAPPING))}",
        )


def _check_architecture(directory: Path, name: str, field: str) -> None:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    try:
        config = read_config(directory)
    except (OSError, ValueError, TypeError) as error:
        raise FieldError(field, f"the configuration of '{name}' cannot be read: {error}") from error
    other = _other_kind(config)
    if other is not None:
        raise unsupported(f"'{name}'", f"it is {other} (model_type {config.model_type})")
    # Tensors on this device have no memory, so that a large model is refused at once.
    with torch.device("meta"):
        model = cast("Any", AutoModelForCausalLM).from_config(config)
    kv_projections(model.base_model)
    if not getattr(model, "_supports_sdpa", True):
        found = f"{type(model).__name__} computes attention in another way than scaled_dot_product_attention"
        raise unsupported(f"'{name}'", f"{found}, such as with capped scores, sinks or ALiBi")


def _other_kind(config: PreTrainedConfig) -> str | None:
    from transformers.models.auto import modeling_auto  # noqa: PLC0415

    def is_in(task: str) -> bool:
        return type(config) in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING")

    generates = is_in("CAUSAL_LM")
    parts: list[str] = list(cast("Any", config).sub_configs)
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder model"
    if is_in("IMAGE_TEXT_TO_TEXT") or (generates and any(part.startswith(_MEDIA) for part in parts)):
        return "a model of text and images or sound, not of text alone"
    if is_in("MASKED_LM") and not (generates and getattr(config, "is_decoder", True)):
        return "an encoder, whose tokens also see the text after them"
    return None if generates else "no language model"

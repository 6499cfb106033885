"""The context length of a model, and the check that samples fit into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from kvcore.errors import FieldError

_ORIGINAL = "original_max_position_embeddings"


def context_length(config: Any) -> tuple[int, str] | None:
    """The most tokens that a model reads without changing how it reads shorter texts, and the setting that says so.

    Beyond it, the longest sample of a batch would change the rotary frequencies of all others (longrope, dynamic), or
    the model was not trained for it. None if the configuration states no length.
    """
    text_config: Any = config.get_text_config()
    long = [rope for rope in _rope_parameters(text_config) if rope.get("rope_type") == "longrope"]
    found = [(cast("int", rope[_ORIGINAL]), _ORIGINAL) for rope in long]
    length = cast("int | None", getattr(text_config, "max_position_embeddings", None))
    if length is not None:
        found.append((length, "max_position_embeddings"))
    return min(found, default=None)


def _rope_parameters(text_config: Any) -> list[Mapping[str, Any]]:
    """The model's rotary embeddings: one, or one per kind of layer."""
    rope = cast("Mapping[str, Any]", getattr(text_config, "rope_parameters", None) or {})
    if "rope_type" in rope:
        return [rope]
    return [cast("Mapping[str, Any]", part) for part in rope.values() if isinstance(part, Mapping)]


def check_context(config: Any, longest_tokens: int, field: str) -> None:
    """Checks that a model reads its longest sample.

    Args:
        config: the model's configuration.
        longest_tokens: positions of the longest sample: its text, or prompt, latents and answer.
        field: the field of the samples in the error.

    Raises:
        FieldError: the sample is longer than the model's context.
    """
    context = context_length(config)
    if context is not None and longest_tokens > context[0]:
        length, setting = context
        raise FieldError(
            field,
            f"the longest sample takes {longest_tokens} tokens, but the student reads at most {length} ({setting} of "
            "its config.json); remove the samples that are longer, or choose a student with a longer context",
        )

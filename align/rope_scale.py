"""Applies and removes rotary position embeddings with a model's own parameters.

With yarn's attention factor a in cos and sin, a rotated key is r = k cos + rotate_half(k) sin, and the content key is
k = (r cos - rotate_half(r) sin) / a^2.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, cast

import torch
from transformers import MODEL_MAPPING, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvcore.errors import FieldError, UnsupportedModelError
from kvcore.types import Tensor

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
Frequencies = Callable[[int], tuple[Tensor, float]]

# Models that rotate the keys of some layers only, which their rotary parameters do not show.
_PARTLY_ROTATED = frozenset(
    {
        "afmoe",
        "beam",
        "cohere2",
        "cohere2_moe",
        "cohere_compass",
        "exaone4",
        "exaone_moe",
        "flint",
        "granite_swa",
        "granitemoe_swa",
        "granitemoehybrid",
        "kolibri1",
        "olmo_hybrid",
        "smollm3",
    }
)


class RoPEScaler:
    """Rotates content keys to their positions, and back.

    Args:
        frequencies: function from the sequence length to the inverse frequencies (fp32 [R/2] for R rotated dims) and
            the attention factor. Only `dynamic` depends on the length.
        interleaved: whether rotated pairs are (0,1), (2,3), … instead of (0,R/2), (1,R/2+1), …
    """

    def __init__(self, frequencies: Frequencies, *, interleaved: bool = False) -> None:
        self._frequencies = frequencies
        self._interleaved = interleaved

    @classmethod
    def from_config(cls, config: PreTrainedConfig, layer_type: str | None = None) -> RoPEScaler:
        """The rotary embedding of the transformers model with this configuration.

        Args:
            config: of a language model, or of a model that contains one.
            layer_type: one of the configuration's `layer_types`, for models that rotate each type differently, such as
                the sliding and full attention of Gemma 3. Optional if all layers are rotated alike.

        Raises:
            UnsupportedModelError: no rotary embedding, an unknown type, or layers that are not rotated.
            FieldError: `layer_type` is missing, or is not one that the model has.
        """
        config = copy.deepcopy(config.get_text_config(decoder=True))
        if config.model_type in _PARTLY_ROTATED:
            raise UnsupportedModelError(f"{type(config).__name__}: it does not rotate the keys of some layers")
        module, embedding = _rotary_embedding(config)
        chosen = _chosen_type(config, layer_type)
        rope_type = _parameters(config, chosen).get("rope_type")
        if rope_type not in ROPE_TYPES:
            raise UnsupportedModelError(
                f"{type(config).__name__}: rope type {rope_type!r} is not one of {', '.join(ROPE_TYPES)}"
            )
        arguments = {} if chosen is None else {"layer_type": chosen}
        interleaved = _is_interleaved(module)
        if rope_type == "default":
            default = partial(embedding.compute_default_rope_parameters, config, **arguments)
            return cls(lambda _length: default(), interleaved=interleaved)
        scaled = partial(ROPE_INIT_FUNCTIONS[rope_type], config, **arguments)
        return cls(lambda length: scaled(seq_len=length), interleaved=interleaved)

    def rotate(self, k_BHTD: Tensor, positions_BT: Tensor, length: int | None = None) -> Tensor:
        """Rotates content keys to the keys that the model would cache, in fp32.

        Args:
            k_BHTD: content keys.
            positions_BT: each token's position; [B,H,T] or [B,1,T] if heads hold different tokens.
            length: tokens of the whole sequence, for `dynamic` frequencies; None means the last position + 1. A model
                keeps the frequencies of the longest sequence that it has read, until it reads one that is shorter than
                its training length.
        """
        cos, sin, _ = self._cos_sin(positions_BT, length, k_BHTD.device)
        return self._turn(k_BHTD.float(), cos, sin)

    def unrotate(self, k_BHTD: Tensor, positions_BT: Tensor, length: int | None = None) -> Tensor:
        """Converts cached keys to content keys, in fp32; arguments as in `rotate`."""
        cos, sin, attention_factor = self._cos_sin(positions_BT, length, k_BHTD.device)
        dims = 2 * cos.shape[-1]
        turned = self._turn(k_BHTD.float(), cos, -sin)
        return torch.cat([turned[..., :dims] / attention_factor**2, turned[..., dims:]], dim=-1)

    def _cos_sin(self, positions: Tensor, length: int | None, device: torch.device) -> tuple[Tensor, Tensor, float]:
        """Cosine and sine [B,H|1,T,R/2], multiplied by the attention factor, and the factor."""
        if positions.dim() == 2:
            positions = positions[:, None]
        if length is None:
            length = int(positions.max()) + 1 if positions.numel() else 1
        frequencies, attention_factor = self._frequencies(length)
        # The same fp32 product as in the model, so that its rounding at long positions is reproduced.
        angles = positions.to(device)[..., None].float() * frequencies.to(device, torch.float32)
        return angles.cos() * attention_factor, angles.sin() * attention_factor, attention_factor

    def _turn(self, k_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates each pair of dims by its angle; dims beyond the rotary part are unchanged."""
        half = cos.shape[-1]
        rotary, rest = k_BHTD[..., : 2 * half], k_BHTD[..., 2 * half :]
        first, second = (rotary[..., 0::2], rotary[..., 1::2]) if self._interleaved else rotary.split(half, dim=-1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        joined = torch.stack(turned, dim=-1).flatten(-2) if self._interleaved else torch.cat(turned, dim=-1)
        return torch.cat([joined, rest], dim=-1)


def _rotary_embedding(config: PreTrainedConfig) -> tuple[ModuleType, Any]:
    """The transformers module that defines the model, and the model's rotary embedding class."""
    if type(config) not in MODEL_MAPPING:
        raise UnsupportedModelError(f"{type(config).__name__}: transformers has no base model for it")
    model_class: type = cast("type", MODEL_MAPPING[type(config)])
    module = importlib.import_module(model_class.__module__)
    prefix = model_class.__name__.removesuffix("Model")
    names = (f"{name}RotaryEmbedding" for name in (prefix, prefix.removesuffix("Text")))
    found = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    if found is None or not hasattr(module, "rotate_half"):
        raise UnsupportedModelError(f"{model_class.__name__}: it has no standard rotary embedding")
    return module, found


def _chosen_type(config: PreTrainedConfig, layer_type: str | None) -> str | None:
    """The layer type whose parameters apply; None if all layers share them."""
    known = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    name = type(config).__name__
    if layer_type is not None and layer_type not in known:
        raise FieldError("layer_type", f"{name} has {', '.join(known) or 'layers of one type'}; got '{layer_type}'")
    parameters = getattr(config, "rope_parameters", None) or {}
    if not any(isinstance(parameters.get(kind), dict) for kind in known):
        return None
    if layer_type is None:
        raise FieldError("layer_type", f"{name} rotates each layer type differently; choose one of {', '.join(known)}")
    return layer_type


def _parameters(config: PreTrainedConfig, chosen: str | None) -> dict[str, Any]:
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters if chosen is None else parameters.get(chosen) or {}


def _is_interleaved(module: ModuleType) -> bool:
    """Whether the model's rotate_half pairs neighbouring dims."""
    rotated = module.rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
    if rotated == [-3.0, -4.0, 1.0, 2.0]:
        return False
    if rotated == [-2.0, 1.0, -4.0, 3.0]:
        return True
    raise UnsupportedModelError(f"{module.__name__}: rotate_half pairs dims in an unknown way")

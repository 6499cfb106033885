"""Undo and redo rotary position embeddings with a model's own parameters.

A rotated key is a (k cos + rotate_half(k) sin), a being yarn's attention factor; so the content key is
(k cos - rotate_half(k) sin) / a^2 applied to the rotated one, since its cos and sin carry a too.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import cast

import torch
from transformers import MODEL_MAPPING, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvcore.errors import UnsupportedModelError
from kvcore.types import Tensor

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
Frequencies = Callable[[int], tuple[Tensor, float]]


class RoPEScaler:
    """Rotates content keys to positions, and back.

    Args:
        frequencies: from the length of the sequence to the inverse frequencies (fp32 [R/2] for R rotated dims) and the
            attention factor. Only `dynamic` depends on the length.
        interleaved: whether pairs are (0,1), (2,3), … rather than halves (0,R/2), (1,R/2+1), …
    """

    def __init__(self, frequencies: Frequencies, *, interleaved: bool = False) -> None:
        self._frequencies = frequencies
        self._interleaved = interleaved

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> RoPEScaler:
        """The rotary embedding that transformers' model of this configuration applies.

        Raises:
            UnsupportedModelError: no rotary embedding, an unknown type, or one per kind of layer.
        """
        config = copy.deepcopy(config)
        module, prefix = _modeling_module(config)
        rope = getattr(config, "rope_parameters", None)
        rope_type = rope.get("rope_type") if isinstance(rope, dict) else None
        if rope_type not in ROPE_TYPES:
            raise UnsupportedModelError(
                f"{type(config).__name__}: rope type {rope_type!r} is not one of {', '.join(ROPE_TYPES)}"
            )
        if rope_type == "default":
            default = getattr(module, f"{prefix}RotaryEmbedding").compute_default_rope_parameters
            return cls(lambda _length: default(config), interleaved=_is_interleaved(module))
        scaled = ROPE_INIT_FUNCTIONS[rope_type]
        return cls(lambda length: scaled(config, seq_len=length), interleaved=_is_interleaved(module))

    def rotate(self, k_BHTD: Tensor, positions_BT: Tensor, length: int | None = None) -> Tensor:
        """Content keys to what the model would have cached, in fp32.

        Args:
            k_BHTD: content keys.
            positions_BT: each token's position; [B,H,T] or [B,1,T] where heads hold different tokens.
            length: tokens in the whole sequence, which `dynamic` frequencies depend on; the last position + 1 if None.
        """
        cos, sin, _ = self._cos_sin(positions_BT, length, k_BHTD.device)
        return self._turn(k_BHTD.float(), cos, sin)

    def unrotate(self, k_BHTD: Tensor, positions_BT: Tensor, length: int | None = None) -> Tensor:
        """Cached keys to content keys, in fp32; arguments as in `rotate`."""
        cos, sin, attention_factor = self._cos_sin(positions_BT, length, k_BHTD.device)
        dims = 2 * cos.shape[-1]
        turned = self._turn(k_BHTD.float(), cos, -sin)
        return torch.cat([turned[..., :dims] / attention_factor**2, turned[..., dims:]], dim=-1)

    def _cos_sin(self, positions: Tensor, length: int | None, device: torch.device) -> tuple[Tensor, Tensor, float]:
        """Cosine and sine [B,H|1,T,R/2] with the attention factor in them, and that factor."""
        if positions.dim() == 2:
            positions = positions[:, None]
        if length is None:
            length = int(positions.max()) + 1 if positions.numel() else 1
        frequencies, attention_factor = self._frequencies(length)
        # The same fp32 product as in the model: at long positions its rounding is part of what has to be undone.
        angles = positions.to(device)[..., None].float() * frequencies.to(device, torch.float32)
        return angles.cos() * attention_factor, angles.sin() * attention_factor, attention_factor

    def _turn(self, k_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turns each pair of dims by its angle; dims beyond the rotary part stay as they are."""
        half = cos.shape[-1]
        rotary, rest = k_BHTD[..., : 2 * half], k_BHTD[..., 2 * half :]
        first, second = (rotary[..., 0::2], rotary[..., 1::2]) if self._interleaved else rotary.split(half, dim=-1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        joined = torch.stack(turned, dim=-1).flatten(-2) if self._interleaved else torch.cat(turned, dim=-1)
        return torch.cat([joined, rest], dim=-1)


def _modeling_module(config: PreTrainedConfig) -> tuple[ModuleType, str]:
    """The transformers module that defines the configuration's model, and the prefix of its class names."""
    if type(config) not in MODEL_MAPPING:
        raise UnsupportedModelError(f"{type(config).__name__}: transformers has no base model for it")
    model_class: type = cast("type", MODEL_MAPPING[type(config)])
    module = importlib.import_module(model_class.__module__)
    prefix = model_class.__name__.removesuffix("Model")
    if not hasattr(module, f"{prefix}RotaryEmbedding") or not hasattr(module, "rotate_half"):
        raise UnsupportedModelError(f"{model_class.__name__}: it has no rotary embedding of the usual form")
    return module, prefix


def _is_interleaved(module: ModuleType) -> bool:
    """Asks the model's own rotate_half which dims it pairs."""
    rotated = module.rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
    if rotated == [-3.0, -4.0, 1.0, 2.0]:
        return False
    if rotated == [-2.0, 1.0, -4.0, 3.0]:
        return True
    raise UnsupportedModelError(f"{module.__name__}: rotate_half pairs dims in an unknown way")

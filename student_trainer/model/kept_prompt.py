"""The keys and values of a prompt, computed once and read by every later pass over what follows the prompt.

Attention is causal, so a prompt's keys and values do not depend on what follows. Gradients flow through them. The kept
cache never changes, so a layer that gradient checkpointing computes again in the backward pass reads the same keys and
values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from kvcore.types import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Recorded(DynamicLayer):
    """Keeps the keys and values that it sees."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class _Kept(DynamicLayer):
    """Puts the kept keys and values before new ones, and does not store the new ones."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device
        self._kept = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._kept
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class PromptRecorder(Cache):
    """The cache for the pass over a prompt, from which `kept` makes the cache for the later passes."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Recorded)

    def kept(self) -> KeptPrompt:
        """The recorded keys and values."""
        assert self.layers, "the pass over the prompt dropped its cache"
        return KeptPrompt([(layer.keys, layer.values) for layer in self.layers])  # type: ignore[misc]


class KeptPrompt(Cache):
    """Every layer's rotated keys and values of a prompt, [B,H,P,D]."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__(layers=[_Kept(k_BHPD, v_BHPD) for k_BHPD, v_BHPD in layers])
        self._layers = tuple(layers)

    def rows(self, indices: Sequence[int]) -> KeptPrompt:
        """The same of some samples, which may repeat."""
        return KeptPrompt([(k_BHPD[indices], v_BHPD[indices]) for k_BHPD, v_BHPD in self._layers])

    def growing(self) -> DynamicCache:
        """A cache that starts with the prompt and keeps what is added, for generation."""
        return DynamicCache(self._layers)


def let_layers_checkpoint_with_cache(lm: PreTrainedModel) -> None:
    """Lets gradient checkpointing keep the two caches above; by default transformers drops any cache."""
    for module in lm.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._can_checkpoint_with_cache = True  # noqa: SLF001 - transformers' own switch

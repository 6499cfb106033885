"""Where a transformers model makes its keys and values: found once, hooked by teachers and students alike.

A content key is what enters the rotary embedding: the output of k_proj (its bias included), after k_norm where the
attention has one. Hooking it is exact for every rotary variant, since nothing has to be un-rotated.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from kvcore.errors import UnsupportedModelError
from kvcore.types import Tensor


@dataclass(frozen=True, slots=True)
class KVProjection:
    """One layer's modules whose outputs are the content keys and the values."""

    layer: int
    attention: nn.Module
    key: nn.Module
    value: nn.Module
    head_dim: int

    def heads_first(self, x: Tensor) -> Tensor:
        """[B,T,H*D] or [B,T,H,D] to [B,H,T,D]."""
        batch, tokens = x.shape[:2]
        return x.reshape(batch, tokens, -1, self.head_dim).transpose(1, 2)


def kv_projections(model: nn.Module) -> list[KVProjection]:
    """Finds every layer's key and value projection, in layer order.

    Raises:
        UnsupportedModelError: a layer has no separate k_proj and v_proj, or the geometry differs between layers.
    """
    found = [_projection(module) for module in model.modules() if _is_attention(module)]
    found.sort(key=lambda projection: projection.layer)
    expected = int(model.config.num_hidden_layers)  # type: ignore[union-attr]
    if [projection.layer for projection in found] != list(range(expected)):
        raise UnsupportedModelError(
            f"{type(model).__name__}: found separate k_proj and v_proj in {len(found)} of {expected} layers; "
            "kvdistill reads decoder-only models with standard attention (Llama, Qwen2, Qwen3, Mistral and their like)"
        )
    if len({projection.head_dim for projection in found}) != 1:
        raise UnsupportedModelError(f"{type(model).__name__}: its layers differ in head dimension")
    return found


def _is_attention(module: nn.Module) -> bool:
    return isinstance(getattr(module, "k_proj", None), nn.Module) and hasattr(module, "layer_idx")


def _projection(attention: nn.Module) -> KVProjection:
    k_proj, v_proj = attention.k_proj, getattr(attention, "v_proj", None)
    if not isinstance(v_proj, nn.Module) or not isinstance(k_proj, nn.Module):
        raise UnsupportedModelError(f"{type(attention).__name__} has a k_proj but no v_proj")
    k_norm = getattr(attention, "k_norm", None)
    key = k_norm if isinstance(k_norm, nn.Module) else k_proj
    return KVProjection(int(attention.layer_idx), attention, key, v_proj, int(attention.head_dim))  # type: ignore[arg-type]

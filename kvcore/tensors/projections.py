"""Finds the modules of a transformers model that output its keys and values, for hooks of teachers and students.

A content key is the input of the rotary embedding: the output of k_proj (with its bias), after the key norm if the
attention has one. Reading it there is exact for every RoPE variant, because nothing has to be un-rotated.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from kvcore.errors import UnsupportedModelError
from kvcore.types import Tensor

# Attentions that norm keys before the rotation, and whether heads come before tokens in the norm's output, which the
# shape does not tell if there are as many tokens as heads. Other attentions may norm after the rotation; then no module
# outputs content keys.
_HEADS_AHEAD_IN_NORM = {
    "ApertusAttention": True,
    "CohereAttention": False,
    "Dots1Attention": False,
    "Exaone4Attention": True,
    "Gemma3Attention": True,
    "Glm4MoeAttention": False,
    "Olmo2Attention": False,
    "Olmo3Attention": False,
    "OlmoeAttention": False,
    "PhiAttention": True,
    "Qwen3Attention": False,
    "Qwen3MoeAttention": False,
    "StableLmAttention": True,
}
# What the child modules of other layers tell about them.
_OTHER_KINDS = (
    (("c_attn", "query_key_value", "qkv_proj", "Wqkv", "W_pack"), "has one projection for queries, keys and values"),
    (("kv_b_proj",), "is multi-head latent attention, which caches a latent vector instead of keys and values"),
    (("conv1d",), "is a state-space or linear-attention layer, which has no keys and values per token"),
)
_KEY_NORMS = ("k_norm", "k_layernorm", "key_layernorm", "key_norm", "k_layer_norm", "qk_norm")


@dataclass(frozen=True, slots=True)
class KVProjection:
    """One layer's modules whose outputs are the content keys and the values.

    `heads_ahead`: whether a 4-dimensional output is [B,H,T,D] instead of [B,T,H,D].
    """

    layer: int
    attention: nn.Module
    key: nn.Module
    value: nn.Module
    head_dim: int
    heads_ahead: bool = False

    def heads_first(self, output: Tensor) -> Tensor:
        """Reshapes the output of one of the modules to [B,H,T,D]."""
        if self._has_heads_ahead(output):
            return output
        batch, tokens = output.shape[:2]
        return output.reshape(batch, tokens, -1, self.head_dim).transpose(1, 2)

    def as_output(self, x_BHTD: Tensor, output: Tensor) -> Tensor:
        """The inverse of `heads_first`: reshapes keys or values like the module's `output`."""
        return x_BHTD if self._has_heads_ahead(output) else x_BHTD.transpose(1, 2).reshape(output.shape)

    def _has_heads_ahead(self, output: Tensor) -> bool:
        return self.heads_ahead and output.dim() == 4


def kv_projections(model: nn.Module) -> list[KVProjection]:
    """Returns every layer's key and value projection, in layer order.

    Raises:
        UnsupportedModelError: a layer has no separate k_proj and v_proj, has an unknown key norm, or has another head
            dimension than the other layers.
    """
    attentions = [module for module in model.modules() if _is_attention(module)]
    layers = sorted(int(module.layer_idx) for module in attentions)  # type: ignore[arg-type]
    expected = int(model.config.num_hidden_layers)  # type: ignore[union-attr]
    if layers != list(range(expected)):
        found = f"found separate k_proj and v_proj in {len(layers)} of {expected} layers{_others(model)}"
        raise unsupported(type(model).__name__, found)
    projections = sorted(map(_projection, attentions), key=lambda projection: projection.layer)
    if len({projection.head_dim for projection in projections}) != 1:
        raise unsupported(type(model).__name__, "the layers differ in head dimension")
    return projections


def unsupported(name: str, found: str) -> UnsupportedModelError:
    """The error for a model of another kind: what was found, what is supported, and the next step."""
    return UnsupportedModelError(
        f"{name}: {found}; kvdistill supports decoder-only language models with standard attention in every layer, "
        "such as Llama, Qwen2, Qwen3, Mistral and Gemma 3; next: choose a model of such a family"
    )


def _is_attention(module: nn.Module) -> bool:
    return isinstance(getattr(module, "k_proj", None), nn.Module) and hasattr(module, "layer_idx")


def _others(model: nn.Module) -> str:
    """What a layer without k_proj and v_proj has instead, for an error."""
    indexed = {module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)}
    for module in model.modules():
        # Decoder layers may have an index, too; their attention is inside them.
        is_inner = module in indexed and indexed.isdisjoint(list(module.modules())[1:])
        if is_inner and not _is_attention(module):
            children = [name for name, child in module.named_children() if hasattr(child, "weight")]
            kinds = [kind for names, kind in _OTHER_KINDS if not set(names).isdisjoint(children)]
            return f"; {type(module).__name__} {kinds[0] if kinds else 'has ' + ', '.join(children)}"
    return ""


def _projection(attention: nn.Module) -> KVProjection:
    k_proj, v_proj = attention.k_proj, getattr(attention, "v_proj", None)
    if not isinstance(v_proj, nn.Module) or not isinstance(k_proj, nn.Module):
        raise unsupported(type(attention).__name__, "it has a k_proj but no v_proj")
    norm = _key_norm(attention)
    heads_ahead = norm is not None and _HEADS_AHEAD_IN_NORM[type(attention).__name__]
    layer, head_dim = int(attention.layer_idx), int(attention.head_dim)  # type: ignore[arg-type]
    return KVProjection(layer, attention, k_proj if norm is None else norm, v_proj, head_dim, heads_ahead)


def _key_norm(attention: nn.Module) -> nn.Module | None:
    norms = [module for name in _KEY_NORMS if isinstance(module := getattr(attention, name, None), nn.Module)]
    if not norms:
        return None
    name = type(attention).__name__
    if name not in _HEADS_AHEAD_IN_NORM:
        raise UnsupportedModelError(
            f"{name} may norm its keys after the rotary embedding; these are known to norm them before it: "
            f"{', '.join(_HEADS_AHEAD_IN_NORM)}"
        )
    return norms[0]

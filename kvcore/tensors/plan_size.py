"""How many tokens a plan keeps of a sample, and how many bytes they take."""

from __future__ import annotations

from kvcore.plan import KVPlan
from kvcore.tensors.codec import layer_bytes

_POSITION_BYTES = 4


def kept_slots(plan: KVPlan, candidates: int) -> int:
    """How many of `candidates` tokens a plan keeps."""
    return candidates if plan.selection.selector == "full" else min(plan.selection.budget, candidates)


def sample_bytes(plan: KVPlan, kv_heads: int, head_dim: int, slots: int, *, streamed: bool = False) -> int:
    """Bytes of one sample's encoded K/V and positions, without headers.

    Args:
        plan: its layers, scope, codec and map.
        kv_heads: of the teacher.
        head_dim: of the teacher.
        slots: M, the tokens kept.
        streamed: as sent over the network, where every layer carries its positions; a store keeps the positions of
            scope `sample` once.
    """
    layers, scope = len(plan.layers), plan.selection.scope
    kv_heads, head_dim = plan.sent_shape(kv_heads, head_dim)
    rows = {"head": layers * kv_heads, "layer": layers, "sample": layers if streamed else 1}[scope]
    return layers * layer_bytes(plan.codec, kv_heads, slots, head_dim) + rows * slots * _POSITION_BYTES

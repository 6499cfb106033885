"""The plan that an alignment needs: which layers a teacher must send, and which selections fit."""

from __future__ import annotations

from align.head_dim_adapter import KVGeometry, check_head_adapter
from align.layer_map import LayerMapper
from kvcore.errors import FieldError
from kvcore.plan import CodecSpec, KVPlan, Selection


def plan_for(
    student: KVGeometry,
    teacher: KVGeometry,
    *,
    selection: Selection,
    codec: CodecSpec,
    layer_map: str = "uniform",
    head_adapter: str = "ridge",
) -> KVPlan:
    """Returns the plan for a teacher whose K/V an `Aligner` with these settings will align.

    Args:
        student: geometry of the student.
        teacher: geometry of the whole teacher.
        selection: which tokens to keep.
        codec: how K/V are encoded.
        layer_map: a strategy of `LayerMapper`.
        head_adapter: a kind of `HeadDimAdapter`.

    Raises:
        FieldError: an unknown setting, `identity` between different geometries, or a scope whose slots hold different
            tokens where the alignment mixes them.
    """
    check_head_adapter(head_adapter, teacher, student)
    mapper = LayerMapper(teacher.layers, student.layers, layer_map)
    problem = None if selection.scope == "sample" else _needs_same_tokens(mapper, head_adapter)
    if problem is not None:
        raise FieldError("kv.selection.scope", f"{problem}: use 'sample', not '{selection.scope}'")
    return KVPlan(layers=mapper.layers_needed, selection=selection, codec=codec)


def _needs_same_tokens(mapper: LayerMapper, head_adapter: str) -> str | None:
    """Why all layers and heads must keep the same tokens; None if they need not."""
    if mapper.mixes_layers:
        return "the layer map mixes layers, which need the same tokens"
    if head_adapter != "identity":
        return "the head adapter mixes heads, and is fitted on the same tokens in all layers"
    if mapper.strategy == "cka":
        return "the layer map 'cka' compares all layers on the same tokens"
    if len(mapper.layers_needed) != mapper.student_layers:
        return "several student layers share a teacher layer, so their slots must hold the same tokens"
    return None

"""The fitted map into the student's shape as a `KVMap`, which a teacher applies before it sends (`align.map_at`).

A teacher's layer is mapped and sent by itself, so each of the layers that are sent must belong to one student layer.
"""

from __future__ import annotations

import torch

from align.aligner import Aligner
from align.head_dim_adapter import KVGeometry
from align.layer_map import LayerMapper
from kvcore.errors import FieldError
from kvcore.tensors.kv_map import LAYERS, KVMap
from kvcore.types import TENSORS, Tensor, TensorKind

FIELD = "align.map_at"
# Head adapters that have a map which does not train.
_FROZEN = ("ridge", "procrustes", "pool")


def check_student_map(teacher: KVGeometry, student: KVGeometry, layer_map: str) -> None:
    """Checks that each teacher layer that is sent belongs to one student layer.

    Raises:
        FieldError: names the layer map and the numbers of layers.
    """
    if not _one_to_one(teacher, student, layer_map):
        layers = f"this teacher's {teacher.layers} layers for {student.layers} of the student"
        raise FieldError(
            FIELD,
            f"a teacher maps each layer separately, but align.layer_map '{layer_map}' mixes or shares {layers}; use "
            "'trainer'",
        )


def can_map_at_teacher(teacher: KVGeometry, student: KVGeometry, layer_map: str, head_adapter: str) -> bool:
    """Whether a teacher can apply the map of an alignment `to_student` with these settings."""
    return head_adapter in _FROZEN and _one_to_one(teacher, student, layer_map)


def _one_to_one(teacher: KVGeometry, student: KVGeometry, layer_map: str) -> bool:
    mapper = LayerMapper(teacher.layers, student.layers, layer_map)
    return mapper.fitted and not mapper.mixes_layers and len(mapper.layers_needed) == student.layers


def student_map(aligner: Aligner) -> KVMap:
    """The map of a calibrated alignment `to_student` for the teacher, on the CPU: its result is `Aligner.targets`.

    Raises:
        FieldError: the layer map mixes or shares teacher layers.
    """
    check_student_map(aligner.teacher, aligner.student, aligner.mapper.strategy)
    layers, student = aligner.layers_needed, aligner.student
    student_layer_of = {row[0][0]: s for s, row in aligner.mapper.get_mapping().items()}
    tensors = {LAYERS: torch.tensor(layers, dtype=torch.int32)}
    for kind in TENSORS:
        maps = [_affine(aligner, kind, student_layer_of[layer]) for layer in layers]
        weight_LFG, bias_LG = (torch.stack(parts).float().cpu() for parts in zip(*maps, strict=True))
        tensors[f"{kind}.centre"] = torch.zeros(len(layers), aligner.teacher.features)
        tensors[f"{kind}.weight"] = weight_LFG.unflatten(2, (student.heads, student.head_dim))
        tensors[f"{kind}.bias"] = bias_LG.unflatten(1, (student.heads, student.head_dim))
    return KVMap(tensors)


def _affine(aligner: Aligner, kind: TensorKind, layer: int) -> tuple[Tensor, Tensor]:
    affine = aligner.adapter.layer_map(kind, layer)
    assert affine is not None, "the head adapter has no map"
    return affine

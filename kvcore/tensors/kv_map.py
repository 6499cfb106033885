"""Linear maps that a teacher applies to the selected K/V before it encodes them.

A map is a safetensors file, and its digest is the hash of the file's bytes. docs/protocol.md lists the tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from kvcore.errors import FieldError
from kvcore.plan import KVPlan, PlanMap
from kvcore.types import TENSORS, TeacherInfo, Tensor, TensorKind

LAYERS = "layers"


@dataclass(frozen=True, eq=False)
class KVMap:
    """y = (x - centre) W + bias for each layer, keys and values apart, where x are a token's heads, concatenated.

    `tensors` holds, by their names in the file: `layers`, int32 [L], the teacher's layers in ascending order; and in
    fp32 for each of `k` and `v` the `centre` [L,F], the `weight` [L,F,H,D] and optionally the `bias` [L,H,D], where F
    are the teacher's features (its KV heads times its head dimension), and H and D the heads and the head dimension of
    y.
    """

    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, content: bytes) -> KVMap:
        """Reads a map.

        Raises:
            FieldError: the content is no such file; or a tensor is missing, unknown, not finite, or has a wrong dtype
                or shape; names the tensor.
        """
        try:
            tensors = load(content)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise FieldError("map", f"is not a safetensors file: {error}") from error
        _check(tensors)
        return cls(tensors)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The teacher's layers that the map is for, ascending."""
        return tuple(_numbers(self.tensors[LAYERS]))

    @property
    def features(self) -> int:
        """F: features of one token and layer of the teacher."""
        return self.tensors["k.centre"].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def named(self) -> PlanMap:
        """The map as a plan names it."""
        heads, head_dim = self.tensors["k.weight"].shape[2:]
        return PlanMap(digest=map_digest(self.content()), heads=heads, head_dim=head_dim)

    def content(self) -> bytes:
        """The file: equal tensors give equal bytes."""
        return save({name: self.tensors[name].contiguous() for name in sorted(self.tensors)})

    def apply(self, x_BHMD: Tensor, layer: int, kind: TensorKind) -> Tensor:
        """Maps keys or values of one of the teacher's layers to [B,H',M,D'], in fp32 on their device."""
        at = self.layers.index(layer)
        centre_F, weight_FHD = (self.tensors[f"{kind}.{name}"][at].to(x_BHMD.device) for name in ("centre", "weight"))
        x_BMF = x_BHMD.float().transpose(1, 2).flatten(2)
        y_BMG: Tensor = (x_BMF - centre_F) @ weight_FHD.flatten(1)
        if (bias_LHD := self.tensors.get(f"{kind}.bias")) is not None:
            y_BMG = y_BMG + bias_LHD[at].flatten().to(x_BHMD.device)
        return y_BMG.view(*y_BMG.shape[:2], *weight_FHD.shape[1:]).transpose(1, 2)

    def check_teacher(self, info: TeacherInfo) -> None:
        """Checks that a teacher has the layers and features that the map is for.

        Raises:
            FieldError: names the tensor, its size and the teacher's.
        """
        features = info.kv_heads * info.head_dim
        if self.features != features:
            raise FieldError("map.k.centre", f"has {self.features} features; this teacher has {features}")
        if self.layers[-1] >= info.layers:
            raise FieldError("map.layers", f"has layer {self.layers[-1]}; this teacher's are 0 to {info.layers - 1}")

    def check_plan(self, plan: KVPlan) -> None:
        """Checks that a plan that names this map asks for its layers, and expects its shape.

        Raises:
            FieldError: names the field of the plan.
        """
        if plan.layers != self.layers:
            problem = f"the map {self.named.digest} is for the layers {list(self.layers)}, not {list(plan.layers)}"
            raise FieldError("plan.layers", problem)
        if plan.map != self.named:
            raise FieldError("plan.map", f"expected the map's own digest and shape, {self.named}; got {plan.map}")


def map_digest(content: bytes) -> str:
    """The digest that names a map: BLAKE2b (16 bytes, hexadecimal) of the file."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _check(tensors: Mapping[str, Tensor]) -> None:
    """See `KVMap.read`."""
    expected = [LAYERS, *(f"{kind}.{name}" for kind in TENSORS for name in ("centre", "weight"))]
    optional = [f"{kind}.bias" for kind in TENSORS]
    described = f"a map has the tensors {', '.join(expected)}, and optionally {', '.join(optional)}"
    for name in expected:
        if name not in tensors:
            raise FieldError(f"map.{name}", f"is missing; {described}")
    unknown = sorted(tensors.keys() - {*expected, *optional})
    if unknown:
        raise FieldError(f"map.{unknown[0]}", f"is unknown; {described}")
    layers = tensors[LAYERS]
    if layers.dtype != torch.int32 or layers.dim() != 1 or not layers.numel():
        raise FieldError("map.layers", f"expected int32 [L]; got {_described(layers)}")
    numbers = _numbers(layers)
    if numbers[0] < 0 or numbers != sorted(set(numbers)):
        raise FieldError("map.layers", f"expected layers of at least 0, ascending, without repeats; got {numbers}")
    sizes: tuple[int, ...] | None = None
    for kind in TENSORS:
        centre, weight = tensors[f"{kind}.centre"], tensors[f"{kind}.weight"]
        if sizes is None:
            sizes = tuple(weight.shape) if weight.dim() == 4 and weight.numel() else (len(numbers), 0, 0, 0)
        _check_tensor(f"{kind}.weight", weight, (len(numbers), *sizes[1:]))
        _check_tensor(f"{kind}.centre", centre, (len(numbers), sizes[1]))
        if (bias := tensors.get(f"{kind}.bias")) is not None:
            _check_tensor(f"{kind}.bias", bias, (len(numbers), *sizes[2:]))


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape or not tensor.numel():
        expected = ", ".join(str(size) if size else "?" for size in shape)
        raise FieldError(f"map.{name}", f"expected float32 [{expected}]; got {_described(tensor)}")
    finite_L: Any = tensor.isfinite().flatten(1).all(dim=1)
    if not finite_L.all():
        raise FieldError(f"map.{name}", f"is not finite at index {finite_L.tolist().index(False)} of its layers")


def _numbers(layers: Tensor) -> list[int]:
    return cast("Any", layers).tolist()


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

"""Linear maps that a teacher applies to the selected K/V before it encodes them.

A map is a safetensors file, and its digest is the hash of the file's bytes. docs/protocol.md lists the tensors.

A coded map is one for the codec `pca`: it leads to components in units of a step, which the codec rounds. It also says
how widely each component varies, for entropy coding, and may say how clients get whole K/V, or the K/V of another
shape to which the components belong.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save

from kvcore.errors import ConfigError, FieldError
from kvcore.plan import CODED, KVPlan, PlanMap
from kvcore.tensors.entropy_coding import CLASSES
from kvcore.types import TENSORS, TeacherInfo, Tensor, TensorKind

LAYERS, WHOLE = "layers", "whole"
BASIS, MEAN = "basis", "mean"
# How far a restoring map may be from a rotation, relative to the size of a vector that it turns and turns back.
_ROTATION_ERROR = 1e-3


@dataclass(frozen=True, eq=False)
class KVMap:
    """y = (x - centre) W + bias for each layer, keys and values apart, where x are a token's heads, concatenated.

    `tensors` holds, by their names in the file: `layers`, int32 [L], the teacher's layers in ascending order; and in
    fp32 for each of `k` and `v` the `centre` [L,F], the `weight` [L,F,H,D] and optionally the `bias` [L,H,D], where F
    are the teacher's features (its KV heads times its head dimension), and H and D the heads and the head dimension of
    y.

    A coded map has in addition for each of `k` and `v` the `step` [L], fp32: a coordinate is y times its layer's step;
    and the `class` [L,H,D], uint8, of each component (`entropy_coding.spread_class`). With `whole`, int32 [2], the KV
    heads and the head dimension of the teacher, W times the step is a rotation, and `decoded` undoes the map. With the
    `basis` [L,G,G] and the `mean` [L,G], fp32, where G are the elements of y, the map leads to the components of K/V in
    another shape, H heads of dimension D. `decoded` then returns these K/V: mean + step basis y; the basis is a
    rotation.
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
        digest = map_digest(self.content())
        return PlanMap(digest=digest, heads=heads, head_dim=head_dim, restores=WHOLE in self.tensors)

    @property
    def coded(self) -> bool:
        """Whether the map is one for the codec `pca`."""
        return "k.step" in self.tensors

    @property
    def turns_back(self) -> bool:
        """Whether the components of a coded map are those of K/V in another shape, to which `decoded` turns them."""
        return f"k.{BASIS}" in self.tensors

    def classes(self, at: int, kind: TensorKind) -> NDArray[np.uint8]:
        """The spread classes of the components of the map's `at`-th layer."""
        return self.tensors[f"{kind}.class"][at].flatten().numpy()

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

    def decoded(self, y_BLHMD: Tensor, kind: TensorKind) -> Tensor:
        """What the rounded y of a coded map stand for: the coordinates, or K/V [B,L,H',M,D'] if it leads back to them.

        Args:
            y_BLHMD: of all layers of the map.
            kind: keys or values.
        """
        tensors = {
            name: self.tensors[f"{kind}.{name}"].to(y_BLHMD.device)
            for name in ("centre", "weight", "step", BASIS, MEAN)
            if f"{kind}.{name}" in self.tensors
        }
        step_L = tensors["step"]
        if self.turns_back:
            scale_L, turn_LFR, origin_LF = step_L, tensors[BASIS], tensors[MEAN]
            shape = [y_BLHMD.shape[2], y_BLHMD.shape[4]]
        elif WHOLE in self.tensors:
            scale_L, turn_LFR, origin_LF = step_L.square(), tensors["weight"].flatten(2), tensors["centre"]
            shape = _numbers(self.tensors[WHOLE])
        else:
            return y_BLHMD * step_L[:, None, None, None]
        batch, layers, _, slots, _ = y_BLHMD.shape
        # One product per layer for all samples: broadcasting would copy the rotations for each of them.
        scaled_BLHMD = y_BLHMD * scale_L[:, None, None, None]
        y_LNR = scaled_BLHMD.permute(1, 0, 3, 2, 4).reshape(layers, batch * slots, turn_LFR.shape[2])
        x_LNF: Tensor = y_LNR @ turn_LFR.transpose(1, 2) + origin_LF[:, None]
        return x_LNF.view(layers, batch, slots, *shape).permute(1, 0, 3, 2, 4)

    def for_layers(self, layers: Sequence[int]) -> KVMap:
        """The map for some of its layers, ascending.

        Raises:
            FieldError: the map lacks one of them.
        """
        if missing := sorted(set(layers) - set(self.layers)):
            raise FieldError("map.layers", f"has no layer {missing[0]}, only {list(self.layers)}")
        rows_L = torch.tensor([self.layers.index(layer) for layer in layers], dtype=torch.long)
        return KVMap({name: x if name == WHOLE else x[rows_L] for name, x in self.tensors.items()})

    def check_teacher(self, info: TeacherInfo) -> None:
        """Checks that a teacher has the layers and features that the map is for.

        Raises:
            FieldError: names the tensor, its size and the teacher's.
        """
        features = info.kv_heads * info.head_dim
        if self.features != features:
            raise FieldError("map.k.centre", f"has {self.features} features; this teacher has {features}")
        whole = self.tensors.get(WHOLE)
        if whole is not None and _numbers(whole) != [info.kv_heads, info.head_dim]:
            theirs = f"this teacher has {info.kv_heads} KV heads of {info.head_dim}"
            raise FieldError(f"map.{WHOLE}", f"is {_numbers(whole)}; {theirs}")
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
        if (plan.codec.name == CODED) != self.coded:
            wanted = "is coded, and needs the codec" if self.coded else "is not coded, so it cannot be used with"
            got = f"; got '{plan.codec.name}'" if self.coded else ""
            raise FieldError("plan.codec", f"the map {self.named.digest} {wanted} '{CODED}'{got}")
        if plan.map != self.named:
            raise FieldError("plan.map", f"expected the map's own digest and shape, {self.named}; got {plan.map}")


def read_coded_map(path: Path) -> KVMap:
    """Reads the KV map of the codec `pca` that `kvdistill calibrate` wrote.

    Raises:
        ConfigError: the file cannot be read, is damaged, or holds no coded map.
    """
    try:
        kv_map = KVMap.read(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except FieldError as error:
        raise ConfigError(f"{path}: {error}; make it anew with kvdistill calibrate") from error
    if not kv_map.coded or WHOLE not in kv_map.tensors:
        raise ConfigError(f"{path}: holds no KV map of the codec '{CODED}'; make one with kvdistill calibrate")
    return kv_map


def map_digest(content: bytes) -> str:
    """The digest that names a map: BLAKE2b (16 bytes, hexadecimal) of the file."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _check(tensors: Mapping[str, Tensor]) -> None:
    """See `KVMap.read`."""
    _check_names(tensors)
    layers = tensors[LAYERS]
    if layers.dtype != torch.int32 or layers.dim() != 1 or not layers.numel():
        raise FieldError("map.layers", f"expected int32 [L]; got {_described(layers)}")
    numbers = _numbers(layers)
    if numbers[0] < 0 or numbers != sorted(set(numbers)):
        raise FieldError("map.layers", f"expected layers of at least 0, ascending, without repeats; got {numbers}")
    weight = tensors[f"{TENSORS[0]}.weight"]
    sizes = tuple(weight.shape) if weight.dim() == 4 and weight.numel() else (len(numbers), 0, 0, 0)
    for kind in TENSORS:
        _check_tensor(f"{kind}.weight", tensors[f"{kind}.weight"], (len(numbers), *sizes[1:]))
        _check_tensor(f"{kind}.centre", tensors[f"{kind}.centre"], (len(numbers), sizes[1]))
        if (bias := tensors.get(f"{kind}.bias")) is not None:
            _check_tensor(f"{kind}.bias", bias, (len(numbers), *sizes[2:]))
        if f"{kind}.step" in tensors:
            _check_coding(tensors, kind, (len(numbers), *sizes[2:]))
    if WHOLE in tensors:
        _check_whole(tensors, sizes)
    if f"{TENSORS[0]}.{BASIS}" in tensors:
        _check_bases(tensors, sizes)


def _check_names(tensors: Mapping[str, Tensor]) -> None:
    expected = [LAYERS, *(f"{kind}.{name}" for kind in TENSORS for name in ("centre", "weight"))]
    coding = [f"{kind}.{name}" for kind in TENSORS for name in ("step", "class")]
    bases = [f"{kind}.{name}" for kind in TENSORS for name in (BASIS, MEAN)]
    optional = [f"{kind}.bias" for kind in TENSORS]
    described = (
        f"a map has the tensors {', '.join(expected)}, and optionally {', '.join(optional)}; a coded one has also "
        f"{', '.join(coding)}, and optionally {WHOLE}, or {', '.join(bases)}"
    )
    turns_back = not tensors.keys().isdisjoint(bases)
    coded = turns_back or not tensors.keys().isdisjoint([*coding, WHOLE])
    for name in [*expected, *(coding if coded else []), *(bases if turns_back else [])]:
        if name not in tensors:
            raise FieldError(f"map.{name}", f"is missing; {described}")
    unknown = sorted(tensors.keys() - {*expected, *optional, *coding, *bases, WHOLE})
    if unknown:
        raise FieldError(f"map.{unknown[0]}", f"is unknown; {described}")


def _check_coding(tensors: Mapping[str, Tensor], kind: TensorKind, shape: tuple[int, ...]) -> None:
    step_L, class_LHD = tensors[f"{kind}.step"], tensors[f"{kind}.class"]
    _check_tensor(f"{kind}.step", step_L, shape[:1])
    if not (step_L > 0).all():
        raise FieldError(f"map.{kind}.step", f"must be above 0; got {float(step_L.min())}")
    if class_LHD.dtype != torch.uint8 or tuple(class_LHD.shape) != shape:
        raise FieldError(f"map.{kind}.class", f"expected uint8 {list(shape)}; got {_described(class_LHD)}")
    if int(class_LHD.max()) >= CLASSES:
        raise FieldError(f"map.{kind}.class", f"must be at most {CLASSES - 1}; got {int(class_LHD.max())}")


def _check_whole(tensors: Mapping[str, Tensor], sizes: tuple[int, ...]) -> None:
    """Checks that a restoring map turns whole heads, so that turning back restores them."""
    whole = tensors[WHOLE]
    if whole.dtype != torch.int32 or tuple(whole.shape) != (2,) or not (whole > 0).all():
        raise FieldError(f"map.{WHOLE}", f"expected int32 [2] above 0; got {_described(whole)}")
    if not math.prod(_numbers(whole)) == sizes[1] == math.prod(sizes[2:]):
        shapes = f"{_numbers(whole)} for {sizes[1]} features and {math.prod(sizes[2:])} components"
        raise FieldError(f"map.{WHOLE}", f"must have as many elements as features and components; got {shapes}")
    for kind in TENSORS:
        rotation_LFG: Tensor = tensors[f"{kind}.weight"].flatten(2) * tensors[f"{kind}.step"][:, None, None]
        _check_no_bias(tensors, kind, WHOLE)
        _check_rotation(f"{kind}.weight", rotation_LFG, WHOLE)


def _check_bases(tensors: Mapping[str, Tensor], sizes: tuple[int, ...]) -> None:
    """Checks that components are turned to K/V of as many elements, by a rotation, so that errors stay what they are.

    Teachers measure the errors of the components.
    """
    if WHOLE in tensors:
        raise FieldError(f"map.{WHOLE}", f"cannot be used with {BASIS}")
    elements = math.prod(sizes[2:])
    for kind in TENSORS:
        _check_tensor(f"{kind}.{BASIS}", tensors[f"{kind}.{BASIS}"], (sizes[0], elements, elements))
        _check_tensor(f"{kind}.{MEAN}", tensors[f"{kind}.{MEAN}"], (sizes[0], elements))
        _check_no_bias(tensors, kind, BASIS)
        _check_rotation(f"{kind}.{BASIS}", tensors[f"{kind}.{BASIS}"], "the decoder")


def _check_no_bias(tensors: Mapping[str, Tensor], kind: TensorKind, other: str) -> None:
    if f"{kind}.bias" in tensors:
        raise FieldError(f"map.{kind}.bias", f"cannot be used with {other}")


def _check_rotation(name: str, rotation_LFG: Tensor, needed_by: str) -> None:
    """Turns random vectors and turns them back."""
    probe_NF: Tensor = torch.randn(4, rotation_LFG.shape[1], generator=torch.Generator().manual_seed(0))
    error_LNF: Tensor = probe_NF @ rotation_LFG @ rotation_LFG.transpose(1, 2) - probe_NF
    error = float(error_LNF.abs().max())
    if not error <= _ROTATION_ERROR:
        raise FieldError(f"map.{name}", f"is not a rotation, which {needed_by} needs: off by {error:.1e}")


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape or not tensor.numel():
        expected = ", ".join(str(size) if size else "?" for size in shape)
        raise FieldError(f"map.{name}", f"expected float32 [{expected}]; got {_described(tensor)}")
    finite_L: Any = tensor.isfinite().reshape(len(tensor), -1).all(dim=1)
    if not finite_L.all():
        raise FieldError(f"map.{name}", f"is not finite at index {finite_L.tolist().index(False)} of its layers")


def _numbers(layers: Tensor) -> list[int]:
    return cast("Any", layers).tolist()


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

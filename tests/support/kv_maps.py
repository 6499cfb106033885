"""Random maps, and the mapping in plain Python, in fp64."""

from __future__ import annotations

import torch

from kvcore.tensors.entropy_coding import spread_class
from kvcore.tensors.kv_map import KVMap
from kvcore.types import TENSORS, Tensor, TensorKind


def random_map(
    layers: tuple[int, ...], features: int, heads: int = 1, head_dim: int = 3, seed: int = 0, *, bias: bool = False
) -> KVMap:
    """A map from `features` to heads x head_dim for these layers of a teacher."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {"layers": torch.tensor(layers, dtype=torch.int32)}
    for kind in TENSORS:
        tensors[f"{kind}.centre"] = torch.randn(len(layers), features, generator=generator)
        weight_LFHD = torch.randn(len(layers), features, heads, head_dim, generator=generator)
        tensors[f"{kind}.weight"] = weight_LFHD / features**0.5
        if bias:
            tensors[f"{kind}.bias"] = torch.randn(len(layers), heads, head_dim, generator=generator)
    return KVMap(tensors)


def naive_mapped(kv_map: KVMap, x_HMD: Tensor, layer: int, kind: TensorKind) -> Tensor:
    """Keys or values of one sample and layer, mapped one number at a time: [H',M,D'] in fp64."""
    place = kv_map.tensors["layers"].tolist().index(layer)
    centre = kv_map.tensors[f"{kind}.centre"][place].tolist()
    weight = kv_map.tensors[f"{kind}.weight"][place].tolist()
    constant = kv_map.tensors.get(f"{kind}.bias", torch.zeros(place + 1, len(weight[0]), len(weight[0][0])))[place]
    heads, slots, dim = x_HMD.shape
    mapped = torch.zeros(len(weight[0]), slots, len(weight[0][0]), dtype=torch.float64)
    for slot in range(slots):
        features = [float(x_HMD[head, slot, d]) for head in range(heads) for d in range(dim)]
        for head in range(mapped.shape[0]):
            for d in range(mapped.shape[2]):
                terms = [(x - c) * row[head][d] for x, c, row in zip(features, centre, weight, strict=True)]
                mapped[head, slot, d] = sum(terms) + float(constant[head, d])
    return mapped


def coded_map(
    layers: tuple[int, ...], heads: int, head_dim: int, *, restores: bool = True, step: float = 0.1, seed: int = 0
) -> KVMap:
    """A coded map of random rotations, for K/V of a spread of about 1."""
    features = heads * head_dim
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {"layers": torch.tensor(layers, dtype=torch.int32)}
    for kind in TENSORS:
        turned_LFF, _ = torch.linalg.qr(torch.randn(len(layers), features, features, generator=generator))
        tensors[f"{kind}.centre"] = torch.randn(len(layers), features, generator=generator)
        tensors[f"{kind}.weight"] = (turned_LFF / step)[:, :, None].contiguous()
        tensors[f"{kind}.step"] = torch.full((len(layers),), step)
        tensors[f"{kind}.class"] = torch.full((len(layers), 1, features), spread_class(1 / step), dtype=torch.uint8)
    if restores:
        tensors["whole"] = torch.tensor([heads, head_dim], dtype=torch.int32)
    return KVMap(tensors)

"""Maps: what they compute, how they are named, and which ones are refused by the name of their tensor."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save

from kvcore.errors import FieldError
from kvcore.plan import CodecSpec, KVPlan, PlanMap, Selection
from kvcore.tensors.kv_map import KVMap, map_digest
from kvcore.types import TENSORS, Tensor
from tests.support.kv_fakes import INFO
from tests.support.kv_maps import coded_map, naive_mapped, random_map

Tensors = dict[str, Tensor]
FEATURES = INFO.kv_heads * INFO.head_dim


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 5), (3, 4)])
def test_mapped_kv_equal_a_naive_map_in_fp64(heads: int, head_dim: int, bias: bool) -> None:
    kv_map = random_map((0, 2), FEATURES, heads, head_dim, bias=bias)
    # Like real keys: a constant that is far larger than what varies.
    offset_H1D = 30 * torch.randn(INFO.kv_heads, 1, INFO.head_dim)
    x_BHMD = torch.randn(2, INFO.kv_heads, 6, INFO.head_dim) + offset_H1D
    for kind in TENSORS:
        for layer in (0, 2):
            found_BHMD = kv_map.apply(x_BHMD.bfloat16() if layer else x_BHMD, layer, kind)
            assert found_BHMD.dtype == torch.float32
            for row in range(2):
                expected = naive_mapped(kv_map, x_BHMD[row].bfloat16() if layer else x_BHMD[row], layer, kind)
                torch.testing.assert_close(found_BHMD[row].double(), expected, atol=1e-5, rtol=1e-5)


def test_a_map_survives_its_file_and_is_named_by_the_files_hash() -> None:
    kv_map = random_map((1, 2), FEATURES, 1, 4, bias=True)
    read = KVMap.read(kv_map.content())
    assert read.layers == (1, 2)
    assert all(read.tensors[name].equal(tensor) for name, tensor in kv_map.tensors.items())
    assert read.named == kv_map.named == PlanMap(digest=map_digest(kv_map.content()), heads=1, head_dim=4)
    others = [
        random_map((1, 2), FEATURES, 1, 4),
        random_map((1, 2), FEATURES, 1, 4, seed=1, bias=True),
        random_map((0, 2), FEATURES, 1, 4, bias=True),
    ]
    assert len({one.named.digest for one in (kv_map, *others)}) == 4


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: change(tensors[name])}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {other: tensor for other, tensor in tensors.items() if other != name}


def with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[1].view(-1)[3] = torch.nan
    return tensor


@pytest.mark.parametrize(
    ("change", "field", "problem"),
    [
        (without("layers"), "map.layers", "is missing; a map has the tensors layers, k.centre, k.weight"),
        (without("v.weight"), "map.v.weight", "is missing"),
        (lambda tensors: tensors | {"k.scale": torch.zeros(1)}, "map.k.scale", "is unknown"),
        (
            lambda tensors: tensors | {"k.bias": torch.zeros(2, 1)},
            "map.k.bias",
            "expected float32 [2, 1, 3]; got float",
        ),
        (lambda tensors: tensors | {"v.bias": torch.full((2, 1, 3), torch.inf)}, "map.v.bias", "is not finite"),
        (changed("layers", lambda x: x.long()), "map.layers", "expected int32 [L]; got int64 [2]"),
        (changed("layers", lambda x: x[:0]), "map.layers", "got int32 [0]"),
        (changed("layers", lambda x: x.flip(0)), "map.layers", "ascending, without repeats; got [2, 0]"),
        (changed("layers", lambda x: x - 1), "map.layers", "at least 0"),
        (changed("k.weight", lambda x: x.double()), "map.k.weight", "expected float32 [2, 32, 1, 3]; got float64"),
        (changed("k.weight", lambda x: x[:1]), "map.k.weight", "expected float32 [2, 32, 1, 3]; got float32 [1, 32"),
        (changed("k.weight", lambda x: x.flatten(2)), "map.k.weight", "expected float32 [2, ?, ?, ?]"),
        (changed("v.weight", lambda x: x[..., :2]), "map.v.weight", "expected float32 [2, 32, 1, 3]"),
        (changed("k.centre", lambda x: x[:, 1:]), "map.k.centre", "expected float32 [2, 32]; got float32 [2, 31]"),
        (changed("v.centre", with_nan), "map.v.centre", "is not finite at index 1 of its layers"),
        (changed("v.weight", lambda x: with_nan(x).nan_to_num(torch.inf)), "map.v.weight", "is not finite at index 1"),
    ],
)
def test_a_wrong_map_is_refused_by_the_name_of_its_tensor(
    change: Callable[[Tensors], Tensors], field: str, problem: str
) -> None:
    tensors = change(dict(random_map((0, 2), FEATURES).tensors))
    with pytest.raises(FieldError) as caught:
        KVMap.read(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    assert caught.value.field == field
    assert problem in caught.value.problem


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"PK\x03\x04" * 9, json.dumps({"layers": [0]}).encode()])
def test_other_files_are_refused(content: bytes) -> None:
    with pytest.raises(FieldError, match=r"^map: is not a safetensors file"):
        KVMap.read(content)


def test_a_map_of_another_teacher_is_refused() -> None:
    random_map((0, 2), FEATURES).check_teacher(INFO)
    with pytest.raises(FieldError, match=r"^map.k.centre: has 33 features; this teacher has 32"):
        random_map((0, 2), 33).check_teacher(INFO)
    with pytest.raises(FieldError, match=r"^map.layers: has layer 2; this teacher's are 0 to 1"):
        random_map((0, 2), FEATURES).check_teacher(dataclasses.replace(INFO, layers=2))


def test_a_plan_must_ask_for_the_maps_layers_and_shape() -> None:
    kv_map = random_map((0, 2), FEATURES, 1, 3)
    plan = KVPlan(layers=(0, 2), map=kv_map.named)
    kv_map.check_plan(plan)
    with pytest.raises(FieldError, match=r"^plan.layers: .*is for the layers \[0, 2\], not \[0, 1\]"):
        kv_map.check_plan(plan.model_copy(update={"layers": (0, 1)}))
    with pytest.raises(FieldError, match=r"^plan.map: expected the map's own digest and shape.*head_dim=4"):
        kv_map.check_plan(plan.with_map(kv_map.named.model_copy(update={"head_dim": 4})))


def test_coded_maps_and_their_codec_need_each_other() -> None:
    coded = coded_map((0, 2), INFO.kv_heads, INFO.head_dim)
    plan = KVPlan(layers=(0, 2), map=coded.named, codec=CodecSpec(name="pca"))
    coded.check_plan(plan)
    with pytest.raises(FieldError, match=r"^plan.codec: the map .* is coded, and needs the codec 'pca'; got 'int8'"):
        coded.check_plan(plan.with_map(coded.named, CodecSpec()))
    plain = random_map((0, 2), FEATURES)
    with pytest.raises(FieldError, match=r"^plan.codec: the map .* is not coded, so it cannot be used with 'pca'"):
        plain.check_plan(plan.with_map(plain.named))
    with pytest.raises(ValueError, match="'pca' needs a coded map"):
        KVPlan(layers=(0, 2), codec=CodecSpec(name="pca"))


def turning_back(heads: int = 2, head_dim: int = 3, seed: int = 5) -> KVMap:
    """A coded map to components that are turned to K/V in another shape."""
    generator = torch.Generator().manual_seed(seed)
    elements = heads * head_dim
    tensors = dict(random_map((0, 2), FEATURES, heads, head_dim, seed).tensors)
    for kind in TENSORS:
        tensors[f"{kind}.step"] = torch.tensor([0.1, 0.3])
        tensors[f"{kind}.class"] = torch.full((2, heads, head_dim), 30, dtype=torch.uint8)
        tensors[f"{kind}.basis"] = torch.linalg.qr(torch.randn(2, elements, elements, generator=generator))[0]
        tensors[f"{kind}.mean"] = 20 * torch.randn(2, elements, generator=generator)
    return KVMap(tensors)


def test_components_are_turned_to_kv_in_another_shape_as_in_fp64() -> None:
    kv_map = KVMap.read(turning_back().content())
    assert kv_map.coded
    assert kv_map.turns_back
    assert kv_map.named == PlanMap(digest=kv_map.named.digest, heads=2, head_dim=3, restores=False)
    y_BLHMD = torch.randint(-40, 40, (4, 2, 2, 5, 3)).float()
    for kind in TENSORS:
        found_BLHMD = kv_map.decoded(y_BLHMD, kind)
        for at in range(2):
            basis_GG, mean_G = (kv_map.tensors[f"{kind}.{name}"][at].double() for name in ("basis", "mean"))
            for row in range(4):
                for slot in range(5):
                    y_G = torch.cat([y_BLHMD[row, at, head, slot] for head in range(2)]).double()
                    expected_G = mean_G + float(kv_map.tensors[f"{kind}.step"][at]) * basis_GG @ y_G
                    found_G = torch.cat([found_BLHMD[row, at, head, slot] for head in range(2)])
                    torch.testing.assert_close(found_G.double(), expected_G, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "field", "problem"),
    [
        (without("v.mean"), "map.v.mean", "is missing"),
        (without("k.basis"), "map.k.basis", "is missing"),
        (without("k.step"), "map.k.step", "is missing"),
        (changed("k.basis", lambda x: x[:, 1:]), "map.k.basis", "expected float32 [2, 6, 6]; got float32 [2, 5, 6]"),
        (changed("v.mean", lambda x: x[:, 1:]), "map.v.mean", "expected float32 [2, 6]"),
        (changed("v.basis", lambda x: 1.01 * x), "map.v.basis", "is not a rotation, which the decoder needs"),
        (lambda tensors: tensors | {"k.bias": torch.zeros(2, 2, 3)}, "map.k.bias", "cannot be used with basis"),
        (
            lambda tensors: tensors | {"whole": torch.tensor([4, 8], dtype=torch.int32)},
            "map.whole",
            "must have as many elements",
        ),
    ],
)
def test_a_wrong_map_that_turns_components_back_is_refused_by_the_name_of_its_tensor(
    change: Callable[[Tensors], Tensors], field: str, problem: str
) -> None:
    tensors = change(dict(turning_back().tensors))
    with pytest.raises(FieldError) as caught:
        KVMap.read(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    assert caught.value.field == field
    assert problem in caught.value.problem


def test_a_map_that_restores_whole_heads_turns_no_other_components_back() -> None:
    tensors = dict(coded_map((0, 2), INFO.kv_heads, INFO.head_dim).tensors)
    for kind in TENSORS:
        tensors |= {f"{kind}.basis": torch.eye(FEATURES).repeat(2, 1, 1), f"{kind}.mean": torch.zeros(2, FEATURES)}
    with pytest.raises(FieldError, match=r"^map.whole: cannot be used with basis"):
        KVMap.read(save(tensors))


def test_layers_of_a_map_are_chosen_by_their_numbers() -> None:
    coded = coded_map((0, 2, 5), INFO.kv_heads, INFO.head_dim)
    chosen = coded.for_layers([0, 5])
    assert chosen.layers == (0, 5)
    x_BHMD = torch.randn(1, INFO.kv_heads, 3, INFO.head_dim)
    assert chosen.apply(x_BHMD, 5, "v").equal(coded.apply(x_BHMD, 5, "v"))
    assert chosen.classes(1, "k").tolist() == coded.classes(2, "k").tolist()
    assert KVMap.read(chosen.content()).named == chosen.named
    with pytest.raises(FieldError, match=r"has no layer 3, only \[0, 2, 5\]"):
        coded.for_layers([0, 3])


def test_heads_that_keep_different_tokens_cannot_be_mapped() -> None:
    selection = Selection(selector="right", budget=2, scope="head")
    with pytest.raises(ValueError, match="a map mixes heads, which must keep the same tokens"):
        KVPlan(layers=(0, 2), selection=selection, map=random_map((0, 2), FEATURES).named)

"""Bases of a teacher's own: they equal a naive PCA in fp64, and leave attention sinks out."""

from __future__ import annotations

import pytest
import torch

from align.head_dim_adapter import KVGeometry
from align.teacher_basis import BasisStatistics, check_basis
from kvcore.errors import FieldError
from kvcore.tensors.entropy_coding import encode_codes, spread_class
from kvcore.tensors.kv_map import KVMap
from kvcore.types import TENSORS, BatchKV, Tensor
from tests.support.kv_maps import random_map

B, L, H, M, D = 5, 2, 2, 12, 3
FEATURES = H * D


def batch(seed: int = 0, slots: int = M) -> BatchKV:
    """K/V with a large constant offset, whose features have different variances and are correlated."""
    generator = torch.Generator().manual_seed(seed)
    mix_FF = torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(99))

    def draw(offset: float) -> Tensor:
        x_BLMF = torch.randn(B, L, slots, FEATURES, generator=generator) * torch.logspace(0, -1.5, FEATURES)
        return (x_BLMF @ mix_FF + offset).unflatten(3, (H, D)).transpose(2, 3)

    mask_BM = torch.arange(slots) < torch.tensor([slots, slots - 1, slots, slots - 3, slots])[:, None]
    ends_BLHM = torch.arange(1, slots + 1).expand(B, 1, 1, slots).masked_fill(~mask_BM[:, None, None], -1)
    return BatchKV(draw(20.0), draw(-3.0), mask_BM, ends_BLHM)


ENDS_BT = torch.arange(1, M + 1).expand(B, M)


def rows(kv: BatchKV, kind: str, layer: int, skip: int) -> Tensor:
    """The rows of one layer by loops, in fp64."""
    x_BLHMD = kv.k_BLHMD if kind == "k" else kv.v_BLHMD
    found = [
        x_BLHMD[sample, layer, :, slot].flatten().double()
        for sample in range(B)
        for slot in range(skip, x_BLHMD.shape[3])
        if kv.mask_BM[sample, slot]
    ]
    return torch.stack(found)


@pytest.mark.parametrize("rank", [1, 3, FEATURES])
@pytest.mark.parametrize("skip", [0, 1])
def test_a_basis_equals_a_naive_pca(rank: int, skip: int) -> None:
    parts = [batch(seed) for seed in range(3)]
    sums = BasisStatistics((1, 4), FEATURES)
    for kv in parts:
        sums.update(kv, ENDS_BT, skip)
    sums.check(rank)
    kv_map, kept_LK = sums.basis(rank)
    assert kv_map.layers == (1, 4)
    assert (kv_map.named.heads, kv_map.named.head_dim) == (1, rank)
    for column, kind in enumerate(TENSORS):
        for layer in range(L):
            x_NF = torch.cat([rows(kv, kind, layer, skip) for kv in parts])
            centred_NF = x_NF - x_NF.mean(dim=0)
            _, singular_F, axes_FF = torch.linalg.svd(centred_NF, full_matrices=False)
            torch.testing.assert_close(
                kv_map.tensors[f"{kind}.centre"][layer].double(), x_NF.mean(dim=0), rtol=1e-6, atol=1e-6
            )
            weight_FR = kv_map.tensors[f"{kind}.weight"][layer, :, 0].double()
            for component in range(rank):
                axis_F = axes_FF[component] * axes_FF[component][axes_FF[component].abs().argmax()].sign()
                torch.testing.assert_close(weight_FR[:, component], axis_F, rtol=0, atol=1e-5)
            kept = float(singular_F[:rank].square().sum() / singular_F.square().sum())
            assert float(kept_LK[layer, column]) == pytest.approx(kept, abs=1e-9)
    if rank == FEATURES:
        assert kept_LK.flatten().tolist() == pytest.approx([1.0] * L * 2)


def test_sums_of_ranks_add_up_and_equal_sums_give_equal_bases() -> None:
    whole, halves = BasisStatistics((0, 1), FEATURES), [BasisStatistics((0, 1), FEATURES) for _ in range(2)]
    for seed in range(4):
        whole.update(batch(seed), ENDS_BT, 1)
        halves[seed % 2].update(batch(seed), ENDS_BT, 1)
    for mine, theirs in zip(halves[0].tensors(), halves[1].tensors(), strict=True):
        mine.add_(theirs)
    together, again = halves[0].basis(2)[0], halves[0].basis(2)[0]
    assert together.named == again.named
    for name, tensor in whole.basis(2)[0].tensors.items():
        torch.testing.assert_close(together.tensors[name], tensor, rtol=0, atol=1e-6)


def test_too_few_tokens_and_bad_numbers_are_refused() -> None:
    sums = BasisStatistics((0, 1), FEATURES)
    with pytest.raises(FieldError, match=r"^align.basis_rank: 4 components need more than 4 tokens.* have 0"):
        sums.check(4)
    kv = batch()
    kv.v_BLHMD[2, 1, 0, 3, 1] = torch.nan
    sums.update(kv, ENDS_BT, 0)
    with pytest.raises(FieldError, match=r"^align.basis_rank: keys or values.* are NaN or infinite"):
        sums.check(4)


def test_a_rank_above_the_features_and_mixed_layers_are_refused() -> None:
    teacher, student = KVGeometry(9, H, D), KVGeometry(4, 1, 8)
    check_basis(FEATURES, teacher, student, "uniform")
    with pytest.raises(FieldError, match=r"got 7, but the teacher has only 6 features per layer \(2 KV heads x 3\)"):
        check_basis(FEATURES + 1, teacher, student, "uniform")
    # With fewer layers than the student, `last` interpolates.
    with pytest.raises(FieldError, match="'last' mixes layers of this teacher"):
        check_basis(2, KVGeometry(3, H, D), student, "last")


@pytest.mark.parametrize("quality", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("whole", [(H, D), None])
def test_a_coded_basis_aims_at_the_error_with_equal_steps(quality: float, whole: tuple[int, int] | None) -> None:
    sums = BasisStatistics((1, 4), FEATURES)
    parts = [batch(seed, slots=60) for seed in range(6)]
    for kv in parts:
        sums.update(kv, torch.arange(1, 61).expand(B, 60), 0)
    rank = FEATURES if whole else 3
    kv_map, _ = sums.basis(rank)
    coded = KVMap.read(sums.coded(kv_map, quality, whole).content())
    assert coded.coded
    assert coded.named.restores == (whole is not None)
    for kind in TENSORS:
        codes, wanted = [], []
        for at, layer in enumerate((1, 4)):
            x_NF = torch.cat([rows(kv, kind, at, 0) for kv in parts])
            y_NR = coded.apply(x_NF.float().view(1, -1, H, D).transpose(1, 2), layer, kind)[0, 0]
            codes.append(y_NR.round())
            basis_FR = kv_map.tensors[f"{kind}.weight"][at].flatten(1).double()
            centred_NF = x_NF - x_NF.mean(dim=0)
            wanted.append(centred_NF @ basis_FR if whole is None else x_NF)
            varying = float((centred_NF @ basis_FR).norm())
            decoded_BLHMD = coded.decoded(torch.stack([codes[-1]] * 2)[None, :, None], kind)
            got_NF = decoded_BLHMD[0, at].transpose(0, 1).flatten(1).double()
            assert float((got_NF - wanted[-1]).norm()) / varying == pytest.approx(quality, rel=0.25)
            spreads = y_NR.double().std(dim=0).tolist()
            classes = coded.classes(at, kind).tolist()
            assert all(abs(spread_class(spread) - found) <= 1 for spread, found in zip(spreads, classes, strict=True))


def quantised(y_NG: Tensor, basis_GG: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Rows around their mean, rounded along the axes of a basis in fp64, and which rows no component nearly ties in."""
    codes_NG = (y_NG - y_NG.mean(dim=0)) @ basis_GG / step
    clear_N = ((codes_NG - codes_NG.floor() - 0.5).abs() > 1e-3).all(dim=1)
    return y_NG.mean(dim=0) + step * codes_NG.round() @ basis_GG.T, clear_N


@pytest.mark.parametrize("quality", [0.01, 0.1, 0.3])
# With fewer elements than the teacher has features, and with more.
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 2), (3, 3)])
def test_a_coded_basis_after_a_map_rounds_what_the_map_gives_in_its_own_components(
    heads: int, head_dim: int, quality: float
) -> None:
    sums = BasisStatistics((1, 4), FEATURES)
    parts = [batch(seed, slots=60) for seed in range(6)]
    for kv in parts:
        sums.update(kv, torch.arange(1, 61).expand(B, 60), 0)
    given = random_map((1, 4), FEATURES, heads, head_dim, bias=True)
    coded = KVMap.read(sums.coded(sums.basis_after(given), quality, None).content())
    assert coded.turns_back
    assert (coded.named.heads, coded.named.head_dim, coded.named.restores) == (heads, head_dim, False)
    for kind in TENSORS:
        for at, layer in enumerate((1, 4)):
            x_NF = torch.cat([rows(kv, kind, at, 0) for kv in parts])
            centre_F, weight_FG, bias_G = (
                given.tensors[f"{kind}.{name}"][at].double().flatten(first)
                for name, first in (("centre", 0), ("weight", 1), ("bias", 0))
            )
            target_NG = (x_NF - centre_F) @ weight_FG + bias_G
            varying_NG = target_NG - target_NG.mean(dim=0)
            axes_GG = torch.linalg.svd(varying_NG, full_matrices=True)[2].T
            expected_NG, clear_N = quantised(target_NG, axes_GG, float(coded.tensors[f"{kind}.step"][at]))
            codes_BHMD = coded.apply(x_NF.float().view(1, -1, H, D).transpose(1, 2), layer, kind).round()
            found_BLHMD = coded.decoded(torch.stack([codes_BHMD] * 2, dim=1), kind)
            found_NG = found_BLHMD[0, at].transpose(0, 1).flatten(1).double()
            assert clear_N.float().mean() > 0.9
            torch.testing.assert_close(found_NG[clear_N], expected_NG[clear_N], atol=1e-5, rtol=1e-6)
            error = float((found_NG - target_NG).norm() / varying_NG.norm())
            assert error == pytest.approx(quality, rel=0.25)
            spreads = codes_BHMD[0].transpose(0, 1).flatten(1).std(dim=0).tolist()
            for spread, number in zip(spreads, coded.classes(at, kind).tolist(), strict=True):
                assert spread < 1 or abs(spread_class(spread) - number) <= 1


def test_a_basis_after_a_map_keeps_the_elements_that_never_vary() -> None:
    sums = BasisStatistics((1, 4), FEATURES)
    kv = batch()
    sums.add(kv, kv.mask_BM)
    given = random_map((1, 4), FEATURES, 2, 2, bias=True)
    for kind in TENSORS:
        given.tensors[f"{kind}.weight"][..., 1] = 0.0
    coded = sums.coded(sums.basis_after(given), 0.1, None)
    y_BHMD = coded.apply(kv.v_BLHMD[:, 0], 1, "v").round()
    decoded_BHMD = coded.decoded(torch.stack([y_BHMD] * 2, dim=1), "v")[:, 0]
    constant_BHM = given.tensors["v.bias"][0, :, 1][None, :, None].expand(B, 2, M)
    torch.testing.assert_close(decoded_BHMD[..., 1], constant_BHM, atol=1e-4, rtol=1e-5)


def test_a_layer_without_variance_is_restored_exactly() -> None:
    kv = batch()
    constant = BatchKV(kv.k_BLHMD * 0 + 5, kv.v_BLHMD * 0, kv.mask_BM, kv.byte_ends_BLHM)
    sums = BasisStatistics((1, 4), FEATURES)
    sums.update(constant, ENDS_BT, 0)
    coded = sums.coded(sums.basis(FEATURES)[0], 0.1, (H, D))
    y_BHMD = coded.apply(constant.k_BLHMD[:, 0], 1, "k").round()
    assert coded.decoded(torch.stack([y_BHMD] * 2, dim=1), "k")[:, 0].allclose(constant.k_BLHMD[:, 0])


@pytest.mark.parametrize("token_bytes", [1.0, 4.0, 12.0])
def test_a_number_of_bytes_gives_the_quality_whose_codes_take_them(token_bytes: float) -> None:
    sums = BasisStatistics((1, 4), FEATURES)
    parts = [batch(seed, slots=60) for seed in range(8)]
    for kv in parts:
        sums.add(kv, kv.mask_BM)
    basis, _ = sums.basis(FEATURES)
    coded = sums.coded(basis, sums.quality_for(basis, token_bytes), (H, D))
    sent = tokens = 0
    for kv in parts:
        for kind, x_BLHMD in zip(TENSORS, (kv.k_BLHMD, kv.v_BLHMD), strict=True):
            for at, layer in enumerate((1, 4)):
                y_BHMD = coded.apply(x_BLHMD[:, at], layer, kind).round()[:, 0][kv.mask_BM]
                sent += len(encode_codes(y_BHMD.short().numpy(), coded.classes(at, kind)))
        tokens += int(kv.mask_BM.sum())
    # Each of the 32 streams has a few bytes at its end. The features are normal, and the tables logistic.
    assert sent / tokens == pytest.approx(token_bytes, rel=0.06, abs=0.1)


def test_a_quality_stays_within_its_limits() -> None:
    sums = BasisStatistics((1, 4), FEATURES)
    sums.add(batch(), batch().mask_BM)
    basis, _ = sums.basis(FEATURES)
    assert sums.quality_for(basis, 1e-6) == 0.999
    assert sums.quality_for(basis, 1e6) == pytest.approx(0.001, rel=0.01)

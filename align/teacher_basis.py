"""A basis of a teacher's own: the principal components of its K/V, layer by layer, separately for keys and values.

In the direction `to_teacher` the targets are then r coordinates per token and layer instead of all heads. They belong
to no student, and only they have to be sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from align.head_dim_adapter import KVGeometry
from align.layer_map import LayerMapper
from align.linear_maps import RidgeStatistics
from align.token_layout import slots_beyond_sinks
from kvcore.errors import FieldError
from kvcore.tensors.entropy_coding import class_bits, spread_class
from kvcore.tensors.kv_map import BASIS, LAYERS, MEAN, WHOLE, KVMap
from kvcore.types import TENSORS, BatchKV, Tensor, TensorKind

FIELD = "align.basis_rank"
_QUALITY_PRECISION = 0.005


def check_basis(rank: int, teacher: KVGeometry, student: KVGeometry, layer_map: str) -> None:
    """Checks that a teacher has a basis of that rank, and that the layer map keeps its layers apart.

    Raises:
        FieldError: names the value and the limit.
    """
    if rank > teacher.features:
        heads = f"{teacher.heads} KV heads x {teacher.head_dim}"
        raise FieldError(FIELD, f"got {rank}, but the teacher has only {teacher.features} features per layer ({heads})")
    if LayerMapper(teacher.layers, student.layers, layer_map).mixes_layers:
        raise FieldError(
            FIELD,
            f"align.layer_map '{layer_map}' mixes layers of this teacher ({teacher.layers} for {student.layers} of the "
            "student), but each layer has its own basis; use 'uniform'",
        )


def can_have_basis(teacher: KVGeometry, student: KVGeometry, layer_map: str, head_adapter: str) -> bool:
    """Whether an alignment `to_teacher` with these settings can compare components of a basis."""
    return (
        head_adapter in ("ridge", "linear") and not LayerMapper(teacher.layers, student.layers, layer_map).mixes_layers
    )


class BasisStatistics:
    """Sums over a teacher's K/V, from which its bases are computed. Memory: 16 L F^2 bytes.

    Args:
        layers: the plan's layers.
        features: F, of one token and layer.
        device: of the sums.
    """

    def __init__(self, layers: Sequence[int], features: int, device: torch.device | None = None) -> None:
        self._layers = tuple(layers)
        self._sums = [[RidgeStatistics(features, 0, device) for _ in layers] for _ in TENSORS]

    @torch.no_grad()
    def update(self, kv: BatchKV, text_byte_ends_BT: Tensor, sink_tokens: int) -> None:
        """Adds a batch, without its attention sinks.

        Args:
            kv: the teacher's K/V in the plan's layers.
            text_byte_ends_BT: byte ends of the student's tokens in the same texts, -1 in padding.
            sink_tokens: how many first tokens of a text are left out.
        """
        self.add(kv, slots_beyond_sinks(kv, text_byte_ends_BT, sink_tokens))

    @torch.no_grad()
    def add(self, kv: BatchKV, mask_BM: Tensor) -> None:
        """Adds the K/V in the slots of a mask."""
        sample_N, slot_N = mask_BM.nonzero(as_tuple=True)
        for sums, x_BLHMD in zip(self._sums, (kv.k_BLHMD, kv.v_BLHMD), strict=True):
            x_NLF = x_BLHMD[sample_N, :, :, slot_N].flatten(2)
            for layer, statistics in enumerate(sums):
                statistics.update(x_NLF[:, layer], x_NLF[:, layer, :0])

    def tensors(self) -> list[Tensor]:
        """All sums; with several ranks, add them in place (all-reduce) before `basis`."""
        return [tensor for sums in self._sums for statistics in sums for tensor in statistics.tensors()]

    def check(self, rank: int) -> None:
        """Checks that there are enough finite tokens for a basis of that rank.

        Raises:
            FieldError: too few tokens, or keys or values that are not finite.
        """
        count = int(self._sums[0][0].count)
        if count <= rank:
            raise FieldError(
                FIELD, f"{rank} components need more than {rank} tokens; the calibration samples have {count}"
            )
        if not all(bool(tensor.isfinite().all()) for tensor in self.tensors()):
            raise FieldError(FIELD, "keys or values of the calibration samples are NaN or infinite")

    def basis(self, rank: int) -> tuple[KVMap, Tensor]:
        """The bases of the first `rank` principal components.

        Equal sums give bitwise equal bases on one machine: the largest entry of each component is positive.

        Returns:
            The map to the components' coordinates, as one head, on the CPU; and the share of the variance that it
            keeps, [L,K].
        """
        tensors = {LAYERS: torch.tensor(self._layers, dtype=torch.int32)}
        kept_KL: list[Tensor] = []
        for kind, sums in zip(TENSORS, self._sums, strict=True):
            parts = [_components(statistics.scatter_xx(), rank) for statistics in sums]
            tensors[f"{kind}.centre"] = torch.stack([s.mean_x for s in sums]).float().cpu()
            tensors[f"{kind}.weight"] = torch.stack([basis_FR for basis_FR, _ in parts])[:, :, None].float().cpu()
            kept_KL.append(torch.stack([kept for _, kept in parts]))
        return KVMap(tensors), torch.stack(kept_KL).T.cpu()

    def basis_after(self, kv_map: KVMap) -> KVMap:
        """The bases of what a map makes of the K/V: all principal components, over its heads together.

        Args:
            kv_map: of the plan's layers, such as `student_map`.

        Returns:
            The map to the components' coordinates, in the shape of the given map's result and on the CPU, with what
            `KVMap.decoded` needs to turn them to that result.
        """
        assert kv_map.layers == self._layers, "the map is for other layers than the sums"
        tensors = {LAYERS: kv_map.tensors[LAYERS]}
        for kind, sums in zip(TENSORS, self._sums, strict=True):
            parts = [_components_after(s, kv_map, kind, at) for at, s in enumerate(sums)]
            for name, of_layers in zip(("centre", "weight", BASIS, MEAN), zip(*parts, strict=True), strict=True):
                tensors[f"{kind}.{name}"] = torch.stack(of_layers).cpu()
        return KVMap(tensors)

    def coded(self, kv_map: KVMap, quality: float, whole: tuple[int, int] | None) -> KVMap:
        """The map of a `basis`, or of a `basis_after` another map, for the codec `pca`.

        All components of a layer's keys, or of its values, have the same step, so that the error is the smallest for
        its bytes (reverse water-filling).

        Args:
            kv_map: what `basis` or `basis_after` returned.
            quality: the error that the codec aims at, relative to the norm of the components' standard deviations.
            whole: KV heads and head dimension of the teacher, for a map from which clients restore whole heads.
        """
        tensors = dict(kv_map.tensors)
        for kind, spreads in self._all_spreads(kv_map).items():
            steps = [_step(spread_R, quality) for spread_R in spreads]
            step_L = torch.tensor(steps, dtype=torch.float32)
            classes = [_classes(spread_R, step) for spread_R, step in zip(spreads, steps, strict=True)]
            weight_LFHD = tensors[f"{kind}.weight"]
            tensors[f"{kind}.weight"] = weight_LFHD / step_L[:, None, None, None]
            tensors[f"{kind}.step"] = step_L
            class_LR = torch.tensor(classes, dtype=torch.uint8)
            tensors[f"{kind}.class"] = class_LR.unflatten(1, weight_LFHD.shape[2:])
        if whole is not None:
            tensors[WHOLE] = torch.tensor(whole, dtype=torch.int32)
        return KVMap(tensors)

    def quality_for(self, kv_map: KVMap, token_bytes: float) -> float:
        """The smallest quality with which a token's keys and values take at most this many bytes in all layers.

        It is between 0.001 and 0.999, even if that takes more bytes, or fewer.

        Args:
            kv_map: what `basis` or `basis_after` returned.
            token_bytes: expected bytes, without positions.
        """
        spreads = [spread_R for by_layer in self._all_spreads(kv_map).values() for spread_R in by_layer]
        low, high = 0.001, 0.999
        while high - low > _QUALITY_PRECISION * low:
            quality = (low + high) / 2
            bits = sum(class_bits(one) for each in spreads for one in _classes(each, _step(each, quality)))
            low, high = (quality, high) if bits > 8 * token_bytes else (low, quality)
        return high

    def _all_spreads(self, kv_map: KVMap) -> dict[TensorKind, list[Tensor]]:
        """The standard deviations [R] of the components of each layer's keys and values."""
        return {
            kind: [
                _spreads(one, weight_FHD)
                for one, weight_FHD in zip(sums, kv_map.tensors[f"{kind}.weight"], strict=True)
            ]
            for kind, sums in zip(TENSORS, self._sums, strict=True)
        }


def _classes(spread_R: Tensor, step: float) -> list[int]:
    return [spread_class(spread / step) for spread in spread_R.tolist()]


def _spreads(statistics: RidgeStatistics, weight_FHD: Tensor) -> Tensor:
    """The standard deviation of each component: [R], fp64."""
    weight_FR = weight_FHD.flatten(1).to(statistics.count.device, torch.float64)
    variance_R = (weight_FR * (statistics.scatter_xx() @ weight_FR)).sum(dim=0) / statistics.count
    return variance_R.clamp(min=0.0).sqrt().cpu()


def _step(spread_R: Tensor, quality: float) -> float:
    """The step with which rounding gives an error of `quality` times the norm of the spreads.

    A component is off by its variance if the step leaves it at zero, and by step^2 / 12 otherwise.
    """
    variance_R = spread_R.square()
    allowed = quality**2 * float(variance_R.sum())
    low, high = 0.0, float((12 * variance_R.max()).sqrt())
    for _ in range(60):
        step = (low + high) / 2
        error = float(variance_R.clamp(max=step**2 / 12).sum())
        low, high = (step, high) if error < allowed else (low, step)
    return low or 1.0


def _components_after(
    statistics: RidgeStatistics, kv_map: KVMap, kind: TensorKind, at: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For the result y [G] of a map of one layer: the map to the components of y, their basis and the mean of y.

    Returns:
        centre_F, weight_FHD, basis_GG and mean_G in fp32.
    """
    device = statistics.count.device
    centre_F, weight_FHD = (
        kv_map.tensors[f"{kind}.{name}"][at].to(device, torch.float64) for name in ("centre", "weight")
    )
    weight_FG, shape = weight_FHD.flatten(1), weight_FHD.shape[1:]
    basis_GG, _ = _components(weight_FG.T @ statistics.scatter_xx() @ weight_FG, weight_FG.shape[1])
    # Rounded before it is used, so that the mean of y belongs to the centre that the teacher subtracts.
    mean_F = statistics.mean_x.float()
    mean_G = (mean_F.double() - centre_F) @ weight_FG
    if (bias_LHD := kv_map.tensors.get(f"{kind}.bias")) is not None:
        mean_G = mean_G + bias_LHD[at].flatten().to(device, torch.float64)
    return mean_F, (weight_FG @ basis_GG).float().unflatten(1, shape), basis_GG.float(), mean_G.float()


def _components(scatter_FF: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first principal components [F,R], by falling variance, and their share of the variance."""
    variance_F, basis_FF = torch.linalg.eigh(scatter_FF)
    basis_FR = basis_FF.flip(1)[:, :rank]
    largest_1R = basis_FR.abs().argmax(dim=0, keepdim=True)
    basis_FR = basis_FR * basis_FR.gather(0, largest_1R).sign()
    variance_F = variance_F.flip(0).clamp(min=0.0)
    total = variance_F.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return basis_FR, variance_F[:rank].sum() / total

"""Maps between the K/V features of two models: pooled, fitted in closed form, trained, or identity.

Features are the concatenated heads of one token: F = H * D. Rows (N) are tokens that both models have read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from align.linear_maps import AffineFit, RidgeStatistics, area_average, fit_procrustes, fit_ridge, measured
from kvcore.errors import FieldError
from kvcore.types import TENSORS, Tensor, TensorKind

logger = logging.getLogger(__name__)

# Share of the variance below which a layer's map is poor.
LEAST_EXPLAINED = 0.2

KINDS = ("identity", "pool", "ridge", "procrustes", "linear", "mapped")
# Kinds that return what they are given.
_UNCHANGED = ("identity", "mapped")


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """The shape of a model's K/V."""

    layers: int
    heads: int
    head_dim: int

    @property
    def features(self) -> int:
        """F: elements of one token's keys (or values) in one layer."""
        return self.heads * self.head_dim


def _check_ridge_rank(rank: int, source: KVGeometry, target: KVGeometry) -> None:
    """Checks that a map between two geometries can have a rank.

    Raises:
        FieldError: names the rank and the limit.
    """
    most = min(source.features, target.features)
    if not 1 <= rank <= most:
        raise FieldError(
            "align.ridge_rank", f"expected 1 to {most}, the features per layer of the smaller model; got {rank}"
        )


def check_head_adapter(kind: str, source: KVGeometry, target: KVGeometry) -> None:
    """Checks that a kind of `HeadDimAdapter` exists and fits two geometries.

    Raises:
        FieldError: an unknown kind, or `identity` or `mapped` between different geometries.
    """
    if kind not in KINDS:
        raise FieldError("align.head_adapter", f"expected one of {', '.join(KINDS)}; got '{kind}'")
    if kind in _UNCHANGED and (source.heads, source.head_dim) != (target.heads, target.head_dim):
        raise FieldError(
            "align.head_adapter",
            f"'{kind}' needs equal heads and head dims; got {source.heads} x {source.head_dim} and "
            f"{target.heads} x {target.head_dim} (use 'ridge')",
        )


class LayerwiseAffine(nn.Module):
    """One affine map F -> G per layer; NaN until fitted or loaded, so that an unfitted map cannot go unnoticed."""

    weight_LFG: Tensor
    bias_LG: Tensor
    alpha_L: Tensor
    explained_variance_L: Tensor

    def __init__(self, layers: int, inputs: int, outputs: int, *, trainable: bool) -> None:
        super().__init__()
        unknown = math.nan
        weight, bias = torch.full((layers, inputs, outputs), unknown), torch.full((layers, outputs), unknown)
        if trainable:
            self.weight_LFG, self.bias_LG = nn.Parameter(weight), nn.Parameter(bias)
        else:
            self.register_buffer("weight_LFG", weight)
            self.register_buffer("bias_LG", bias)
        self.register_buffer("alpha_L", torch.full((layers,), unknown, dtype=torch.float64))
        self.register_buffer("explained_variance_L", torch.full((layers,), unknown, dtype=torch.float64))

    @torch.no_grad()
    def set_layer(self, layer: int, fit: AffineFit) -> None:
        """Sets one layer's map."""
        self.weight_LFG[layer].copy_(fit.weight_FG)
        self.bias_LG[layer].copy_(fit.bias_G)
        self.alpha_L[layer] = fit.alpha
        self.explained_variance_L[layer] = fit.explained_variance

    def forward(self, x_LNF: Tensor) -> Tensor:
        """Maps [L,N,F] to [L,N,G], in fp32."""
        return torch.baddbmm(self.bias_LG.float()[:, None], x_LNF.float(), self.weight_LFG.float())


class HeadDimAdapter(nn.Module):
    """Maps K/V of one geometry to another, per layer, separately for keys and values; heads may mix.

    | kind | map | needs `fit` |
    |---|---|---|
    | `identity` | none; needs equal heads and head dims | no |
    | `pool` | averages neighbouring heads, and neighbouring dims (see `area_average`); no intercept | to be measured |
    | `ridge` | any, least squares with a penalty (`fit_ridge`) | yes |
    | `procrustes` | a rotation with one scale (`fit_procrustes`) | yes |
    | `linear` | starts as `ridge` and trains | yes |
    | `mapped` | none; the teacher has applied one of the others before it sent the K/V | to be measured |

    All kinds except `linear` are frozen, because their output is a target. `pool` assumes that both models order their
    heads and dims in the same way, which is rare; check its explained variance.

    Args:
        layers: L, of the side that is compared.
        source: geometry of the input.
        target: geometry of the output.
        kind: one of `KINDS`.
        ridge_rank: the highest rank of the maps of `ridge`; by default it is not limited.

    Raises:
        FieldError: an unknown kind, `identity` or `mapped` between different geometries, or a rank that is too high.
    """

    def __init__(
        self,
        layers: int,
        source: KVGeometry,
        target: KVGeometry,
        kind: str = "ridge",
        ridge_rank: int | None = None,
    ) -> None:
        super().__init__()
        check_head_adapter(kind, source, target)
        if ridge_rank is not None:
            assert kind == "ridge", "only ridge maps have a limited rank"
            _check_ridge_rank(ridge_rank, source, target)
        self.kind = kind
        self._ridge_rank = ridge_rank
        self.source = source
        self.target = target
        self.maps = nn.ModuleDict()
        # `mapped` has measurements, but no map.
        inputs, outputs = (0, 0) if kind == "mapped" else (source.features, target.features)
        for tensor in TENSORS if kind != "identity" else ():
            self.maps[tensor] = LayerwiseAffine(layers, inputs, outputs, trainable=kind == "linear")
            if kind == "pool":
                self._set_pool(self._affine(tensor))

    def fit(self, tensor: TensorKind, fit: Sequence[RidgeStatistics], held_out: Sequence[RidgeStatistics]) -> None:
        """Fits every layer of keys or values; equal statistics give bitwise equal maps on one machine.

        `pool` and `mapped` are not fitted, only measured on `held_out`.
        """
        affine = self._affine(tensor)
        for layer, (seen, unseen) in enumerate(zip(fit, held_out, strict=True)):
            affine.set_layer(layer, self._fit_layer(affine, layer, seen, unseen))

    def _fit_layer(
        self, affine: LayerwiseAffine, layer: int, seen: RidgeStatistics, unseen: RidgeStatistics
    ) -> AffineFit:
        if self.kind == "mapped":
            unchanged_FF = torch.eye(self.source.features, dtype=torch.float64, device=unseen.count.device)
            explained = unseen.explained_variance(unchanged_FF, unchanged_FF.new_zeros(self.target.features))
            return AffineFit(affine.weight_LFG[layer], affine.bias_LG[layer], math.nan, explained)
        if self.kind == "pool":
            return measured(affine.weight_LFG[layer], affine.bias_LG[layer], unseen)
        if self.kind == "procrustes":
            return fit_procrustes(seen, unseen)
        return fit_ridge(seen, unseen, rank=self._ridge_rank)

    def _set_pool(self, affine: LayerwiseAffine) -> None:
        heads = area_average(self.source.heads, self.target.heads)
        dims = area_average(self.source.head_dim, self.target.head_dim)
        affine.weight_LFG.copy_(torch.kron(heads, dims))
        affine.bias_LG.zero_()

    def forward(self, x_BLHMD: Tensor, tensor: TensorKind) -> Tensor:
        """Maps [B,L,H,M,D] of the source geometry to the target geometry, in fp32."""
        if self.kind in _UNCHANGED:
            return x_BLHMD.float()
        batch, layers, _, slots, _ = x_BLHMD.shape
        x_LNF = x_BLHMD.permute(1, 0, 3, 2, 4).reshape(layers, batch * slots, -1)
        y_LNG = self.maps[tensor](x_LNF)
        return y_LNG.view(layers, batch, slots, self.target.heads, self.target.head_dim).permute(1, 0, 3, 2, 4)

    def _affine(self, tensor: TensorKind) -> LayerwiseAffine:
        affine = self.maps[tensor]
        assert isinstance(affine, LayerwiseAffine)
        return affine

    def layer_map(self, tensor: TensorKind, layer: int) -> tuple[Tensor, Tensor] | None:
        """weight_FG and bias_G of one layer; None for `identity` and `mapped`."""
        if self.kind in _UNCHANGED:
            return None
        affine = self._affine(tensor)
        return affine.weight_LFG.detach()[layer], affine.bias_LG.detach()[layer]

    def explained_variance(self, tensor: TensorKind) -> list[float]:
        """Explained variance per layer on held-out rows; NaN until `fit`, empty for `identity`."""
        return [] if self.kind == "identity" else self._affine(tensor).explained_variance_L.tolist()

    def alpha(self, tensor: TensorKind) -> list[float]:
        """Chosen ridge penalty per layer; NaN if the kind has none, empty for `identity`."""
        return [] if self.kind == "identity" else self._affine(tensor).alpha_L.tolist()

    def warn_if_poor(self, name: str, advice: str) -> None:
        """Logs a warning with the layers whose map explains less than `LEAST_EXPLAINED`, and what helps."""
        for tensor in TENSORS:
            values = self.explained_variance(tensor)
            poor = [f"{layer} ({value:.2f})" for layer, value in enumerate(values) if not value >= LEAST_EXPLAINED]
            if poor:
                logger.warning(
                    "%s: the adapter explains less than %.2f of the variance of %s in layers %s; %s",
                    name, LEAST_EXPLAINED, {"k": "keys", "v": "values"}[tensor], ", ".join(poor), advice,
                )  # fmt: skip


class TeacherSpaceRegressor(HeadDimAdapter):
    """Maps the student's K/V to the teacher's geometry for the direction `to_teacher`; trains.

    It may start at random, because its targets are fixed. `fit` gives it a closed-form start, from statistics with the
    student's rows as x and the teacher's as y.
    """

    def __init__(self, layers: int, student: KVGeometry, teacher: KVGeometry) -> None:
        super().__init__(layers, student, teacher, kind="linear")
        bound = student.features**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

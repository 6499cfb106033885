"""Maps between the K/V features of two models: closed-form ridge from streamed statistics, trained, or the identity.

Features are all heads of a token in a row: F = H * D, head after head. Rows (N) are tokens that both models have read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from kvcore.errors import FieldError
from kvcore.types import Tensor

logger = logging.getLogger(__name__)

TensorKind = Literal["k", "v"]
TENSORS: tuple[TensorKind, ...] = ("k", "v")
KINDS = ("identity", "ridge", "linear")
# Ridge penalties, relative to the mean eigenvalue of the inputs' covariance.
ALPHAS = tuple(10.0**exponent for exponent in range(-6, 2))


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


class RidgeStatistics:
    """All that a linear map with intercept from x to y needs to know of the rows seen, in fp64.

    Args:
        inputs: F.
        outputs: G; 0 where only the moments of x are wanted.
        device: where the sums live.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | None = None) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.count = zeros(1)
        self.sum_x_F = zeros(inputs)
        self.sum_y_G = zeros(outputs)
        self.xx_FF = zeros(inputs, inputs)
        self.xy_FG = zeros(inputs, outputs)
        self.yy_G = zeros(outputs)

    @torch.no_grad()
    def update(self, x_NF: Tensor, y_NG: Tensor) -> None:
        """Adds rows."""
        assert len(x_NF) == len(y_NG), "x and y are rows of the same tokens"
        x_NF, y_NG = (rows.to(self.count.device, torch.float64) for rows in (x_NF, y_NG))
        self.count += len(x_NF)
        self.sum_x_F += x_NF.sum(dim=0)
        self.sum_y_G += y_NG.sum(dim=0)
        self.xx_FF += x_NF.T @ x_NF
        self.xy_FG += x_NF.T @ y_NG
        self.yy_G += y_NG.square().sum(dim=0)

    def tensors(self) -> list[Tensor]:
        """The sums themselves: adding another rank's in place (an all-reduce) merges what both have seen."""
        return [self.count, self.sum_x_F, self.sum_y_G, self.xx_FF, self.xy_FG, self.yy_G]

    def merged(self, other: RidgeStatistics) -> RidgeStatistics:
        """What both have seen together."""
        both = RidgeStatistics(len(self.sum_x_F), len(self.sum_y_G), self.count.device)
        for total, mine, theirs in zip(both.tensors(), self.tensors(), other.tensors(), strict=True):
            torch.add(mine, theirs, out=total)
        return both

    @property
    def mean_x(self) -> Tensor:
        """[F]."""
        return self.sum_x_F / self.count

    @property
    def mean_y(self) -> Tensor:
        """[G]."""
        return self.sum_y_G / self.count

    def scatter_xx(self) -> Tensor:
        """Sum over rows of (x - mean)(x - mean)': [F,F]."""
        return self.xx_FF - torch.outer(self.sum_x_F, self.mean_x)

    def scatter_xy(self) -> Tensor:
        """Sum over rows of (x - mean)(y - mean)': [F,G]."""
        return self.xy_FG - torch.outer(self.sum_x_F, self.mean_y)

    def scatter_yy(self) -> Tensor:
        """Sum over rows of (y - mean)^2: [G]."""
        return self.yy_G - self.sum_y_G * self.mean_y

    def squared_error(self, weight_FG: Tensor, bias_G: Tensor) -> float:
        """Sum over rows and features of (x W + b - y)^2, without the rows."""
        around_mean_G = (
            self.scatter_yy()
            - 2 * (weight_FG * self.scatter_xy()).sum(dim=0)
            + (weight_FG * (self.scatter_xx() @ weight_FG)).sum(dim=0)
        )
        miss_G = self.mean_x @ weight_FG + bias_G - self.mean_y
        return float((around_mean_G + self.count * miss_G.square()).sum())

    def explained_variance(self, weight_FG: Tensor, bias_G: Tensor) -> float:
        """1 - squared error over the variation of y around its mean: 1 is exact, 0 no better than the mean.

        NaN where y never varied.
        """
        variation = float(self.scatter_yy().sum())
        return 1.0 - self.squared_error(weight_FG, bias_G) / variation if variation > 0 else math.nan


@dataclass(frozen=True, slots=True)
class RidgeFit:
    """An affine map in fp64, the penalty chosen, and the explained variance on the rows held out."""

    weight_FG: Tensor
    bias_G: Tensor
    alpha: float
    explained_variance: float


def fit_ridge(fit: RidgeStatistics, held_out: RidgeStatistics, alphas: Sequence[float] = ALPHAS) -> RidgeFit:
    """W = (X'X + alpha trace(X'X)/F I)^-1 X'Y over centred rows, with the alpha that errs least on `held_out`."""
    eigenvalues_F, basis_FF = torch.linalg.eigh(fit.scatter_xx())
    # Rounding can leave eigenvalues of a singular matrix slightly below 0.
    eigenvalues_F = eigenvalues_F.clamp(min=0.0)
    mean_eigenvalue = eigenvalues_F.mean().clamp(min=torch.finfo(torch.float64).tiny)
    projected_FG = basis_FF.T @ fit.scatter_xy()

    def with_penalty(alpha: float) -> RidgeFit:
        weight_FG = basis_FF @ (projected_FG / (eigenvalues_F + alpha * mean_eigenvalue)[:, None])
        bias_G = fit.mean_y - fit.mean_x @ weight_FG
        return RidgeFit(weight_FG, bias_G, alpha, held_out.explained_variance(weight_FG, bias_G))

    return min(map(with_penalty, alphas), key=lambda tried: held_out.squared_error(tried.weight_FG, tried.bias_G))


class LayerwiseAffine(nn.Module):
    """One affine map F -> G per layer. NaN until fitted or loaded, so that nothing unfitted passes for a target."""

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
    def set_layer(self, layer: int, fit: RidgeFit) -> None:
        """Takes over one layer's fit."""
        self.weight_LFG[layer].copy_(fit.weight_FG)
        self.bias_LG[layer].copy_(fit.bias_G)
        self.alpha_L[layer] = fit.alpha
        self.explained_variance_L[layer] = fit.explained_variance

    def forward(self, x_LNF: Tensor) -> Tensor:
        """[L,N,F] to [L,N,G], in fp32."""
        return torch.baddbmm(self.bias_LG.float()[:, None], x_LNF.float(), self.weight_LFG.float())


class HeadDimAdapter(nn.Module):
    """Brings K/V of one geometry into another, per layer, keys and values apart, heads mixed freely.

    `identity` passes through and needs equal features. `ridge` is fitted in closed form and frozen: its output is a
    target, which must not move. `linear` starts from ridge and trains.

    Args:
        layers: L, of the side that is compared.
        source: heads and head dim of what comes in.
        target: heads and head dim of what goes out.
        kind: `identity`, `ridge` or `linear`.

    Raises:
        FieldError: an unknown kind, or `identity` between different geometries.
    """

    def __init__(self, layers: int, source: KVGeometry, target: KVGeometry, kind: str = "ridge") -> None:
        super().__init__()
        if kind not in KINDS:
            raise FieldError("align.head_adapter", f"expected one of {', '.join(KINDS)}; got '{kind}'")
        if kind == "identity" and (source.heads, source.head_dim) != (target.heads, target.head_dim):
            raise FieldError(
                "align.head_adapter",
                f"'identity' needs equal heads and head dims; got {source.heads} x {source.head_dim} and "
                f"{target.heads} x {target.head_dim} (use 'ridge')",
            )
        self.kind = kind
        self.target = target
        self.maps = nn.ModuleDict()
        if kind != "identity":
            for tensor in TENSORS:
                self.maps[tensor] = LayerwiseAffine(
                    layers, source.features, target.features, trainable=kind == "linear"
                )

    def fit(self, tensor: TensorKind, fit: Sequence[RidgeStatistics], held_out: Sequence[RidgeStatistics]) -> None:
        """Fits every layer of keys or values; the same statistics give the same bits on one machine."""
        for layer, (seen, unseen) in enumerate(zip(fit, held_out, strict=True)):
            self._affine(tensor).set_layer(layer, fit_ridge(seen, unseen))

    def forward(self, x_BLHMD: Tensor, tensor: TensorKind) -> Tensor:
        """[B,L,H,M,D] of the source geometry to the target's, in fp32."""
        if self.kind == "identity":
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
        """weight_FG and bias_G of one layer; None for the identity."""
        if self.kind == "identity":
            return None
        affine = self._affine(tensor)
        return affine.weight_LFG.detach()[layer], affine.bias_LG.detach()[layer]

    def explained_variance(self, tensor: TensorKind) -> list[float]:
        """Per layer, on the rows held out from the fit; empty for the identity, which is not fitted."""
        return [] if self.kind == "identity" else self._affine(tensor).explained_variance_L.tolist()

    def alpha(self, tensor: TensorKind) -> list[float]:
        """Per layer, the ridge penalty chosen; empty for the identity."""
        return [] if self.kind == "identity" else self._affine(tensor).alpha_L.tolist()

    def warn_if_poor(self, threshold: float = 0.2, name: str = "teacher") -> None:
        """Logs a warning that names the layers whose map explains less than `threshold` of the variance."""
        for tensor in TENSORS:
            values = self.explained_variance(tensor)
            poor = [f"{layer} ({value:.2f})" for layer, value in enumerate(values) if not value >= threshold]
            if poor:
                logger.warning(
                    "%s: the adapter explains less than %.2f of the variance of %s in layers %s; "
                    "raise align.calibration_samples or choose another teacher",
                    name, threshold, {"k": "keys", "v": "values"}[tensor], ", ".join(poor),
                )  # fmt: skip

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that was fitted or trained, on CPU, as safetensors takes it."""
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.state_dict().items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `state_tensors` gave."""
        self.load_state_dict(tensors, strict=True)


class TeacherSpaceRegressor(HeadDimAdapter):
    """Maps the student's K/V into the teacher's heads and head dim, for the `to_teacher` direction; trains.

    Unlike a target's adapter it may start at random, since what it is compared with stays put. `fit` starts it in
    closed form instead, from statistics with the student's rows as x and the teacher's as y.
    """

    def __init__(self, layers: int, student: KVGeometry, teacher: KVGeometry) -> None:
        super().__init__(layers, student, teacher, kind="linear")
        bound = student.features**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

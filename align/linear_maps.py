"""Linear maps with intercept between two sets of features, in closed form from streamed statistics.

Rows (N) are tokens that both models have read; the maps predict y (G) from x (F).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvcore.types import Tensor

# Ridge penalties, relative to the mean eigenvalue of the inputs' covariance.
ALPHAS = tuple(10.0**exponent for exponent in range(-6, 2))
# Candidates for a rotation that drops dimensions, from the least-squares map (0) to the cross-covariance (infinity).
PROCRUSTES_ALPHAS = (0.0, 1e-4, 1e-2, 1.0, math.inf)


class RidgeStatistics:
    """Sufficient statistics for a linear map with intercept from x to y, in fp64.

    Args:
        inputs: F.
        outputs: G; 0 if only the moments of x are needed.
        device: of the sums.
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
        """The sums; adding another rank's in place (all-reduce) merges both."""
        return [self.count, self.sum_x_F, self.sum_y_G, self.xx_FF, self.xy_FG, self.yy_G]

    def merged(self, other: RidgeStatistics) -> RidgeStatistics:
        """The statistics of both sets of rows together."""
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
        """Sum over rows and features of (x W + b - y)^2, from the statistics."""
        around_mean_G = (
            self.scatter_yy()
            - 2 * (weight_FG * self.scatter_xy()).sum(dim=0)
            + (weight_FG * (self.scatter_xx() @ weight_FG)).sum(dim=0)
        )
        miss_G = self.mean_x @ weight_FG + bias_G - self.mean_y
        return float((around_mean_G + self.count * miss_G.square()).sum())

    def explained_variance(self, weight_FG: Tensor, bias_G: Tensor) -> float:
        """1 - squared error / variation of y around its mean: 1 is exact, 0 is no better than the mean.

        NaN if y never varies.
        """
        variation = float(self.scatter_yy().sum())
        return 1.0 - self.squared_error(weight_FG, bias_G) / variation if variation > 0 else math.nan


@dataclass(frozen=True, slots=True)
class AffineFit:
    """An affine map in fp64, its penalty (NaN if it has none), and the explained variance on held-out rows."""

    weight_FG: Tensor
    bias_G: Tensor
    alpha: float
    explained_variance: float


def fit_ridge(
    fit: RidgeStatistics, held_out: RidgeStatistics, alphas: Sequence[float] = ALPHAS, rank: int | None = None
) -> AffineFit:
    """W = (X'X + alpha trace(X'X)/F I)^-1 X'Y over centred rows, with the alpha of least error on `held_out`.

    With `rank`, W has at most this rank: it is the map of that rank with the least penalised error on `fit`
    (reduced-rank ridge regression, Mukherjee and Zhu 2011).
    """
    penalised = _penalised_solver(fit)

    def with_penalty(alpha: float) -> AffineFit:
        weight_FG = penalised(alpha)
        if rank is not None and rank < min(weight_FG.shape):
            weight_FG = _of_rank(weight_FG, fit.scatter_xy(), rank)
        return _with_intercept(weight_FG, fit, held_out, alpha)

    return min(map(with_penalty, alphas), key=lambda tried: held_out.squared_error(tried.weight_FG, tried.bias_G))


def fit_procrustes(fit: RidgeStatistics, held_out: RidgeStatistics) -> AffineFit:
    """A rotation with one scale and an intercept, c x R + b: R'R = I where F >= G, RR' = I where F <= G.

    For F <= G, R is the polar factor of the centred X'Y, the semi-orthogonal map of least error (Schoenemann 1966). For
    F > G, R drops dimensions of x and least squares has no closed form; R is then the polar factor of a ridge map, with
    the penalty of least error on `held_out`, from 0 (exact if y is a rotation of a part of x) to infinity (X'Y itself).
    The scale c is least squares given R. The fit's `alpha` is NaN.
    """
    if len(fit.sum_x_F) <= len(fit.sum_y_G):
        return _rotation(fit.scatter_xy(), fit, held_out)
    penalised = _penalised_solver(fit)
    tries = (_rotation(penalised(alpha), fit, held_out) for alpha in PROCRUSTES_ALPHAS)
    return min(tries, key=lambda tried: held_out.squared_error(tried.weight_FG, tried.bias_G))


def measured(weight_FG: Tensor, bias_G: Tensor, held_out: RidgeStatistics) -> AffineFit:
    """A given map with its explained variance on `held_out`."""
    weight_FG, bias_G = (part.to(held_out.count.device, torch.float64) for part in (weight_FG, bias_G))
    return AffineFit(weight_FG, bias_G, math.nan, held_out.explained_variance(weight_FG, bias_G))


def area_average(source: int, target: int) -> Tensor:
    """Weights, fp64 [source,target], with which target index j averages the source range [j S/T, (j+1) S/T).

    Columns sum to 1. If T is a multiple of S, indices are repeated; if S is a multiple of T, the weights are means.
    """
    # In units of 1/(source target) all edges are integers, so ranges that only touch overlap by exactly 0.
    left_S = torch.arange(source, dtype=torch.float64)[:, None] * target
    left_T = torch.arange(target, dtype=torch.float64) * source
    overlap_ST = torch.minimum(left_S + target, left_T + source) - torch.maximum(left_S, left_T)
    return overlap_ST.clamp(min=0.0) / source


def _penalised_solver(fit: RidgeStatistics) -> Callable[[float], Tensor]:
    """Returns a function from a penalty to its least-squares map: 0 gives least norm, infinity only the direction."""
    eigenvalues_F, basis_FF = torch.linalg.eigh(fit.scatter_xx())
    # Rounding can make eigenvalues of a singular matrix slightly negative.
    eigenvalues_F = eigenvalues_F.clamp(min=0.0)
    precision = torch.finfo(torch.float64)
    mean_eigenvalue = eigenvalues_F.mean().clamp(min=precision.tiny)
    none_F = eigenvalues_F <= precision.eps * len(eigenvalues_F) * eigenvalues_F.max()
    scatter_FG = fit.scatter_xy()
    projected_FG = basis_FF.T @ scatter_FG

    def solve(alpha: float) -> Tensor:
        if math.isinf(alpha):
            return scatter_FG
        coordinates_FG = projected_FG / (eigenvalues_F + alpha * mean_eigenvalue)[:, None]
        return basis_FF @ (coordinates_FG.masked_fill(none_F[:, None], 0.0) if alpha == 0 else coordinates_FG)

    return solve


def _of_rank(weight_FG: Tensor, scatter_FG: Tensor, rank: int) -> Tensor:
    """The ridge map W, projected onto the first directions of its fitted outputs.

    They are the first eigenvectors of W'(X'X + penalty)W, which equals W'X'Y.
    """
    fitted_GG = weight_FG.T @ scatter_FG
    _, directions_GG = torch.linalg.eigh((fitted_GG + fitted_GG.T) / 2)
    first_GR = directions_GG[:, -rank:]
    return weight_FG @ first_GR @ first_GR.T


def _rotation(direction_FG: Tensor, fit: RidgeStatistics, held_out: RidgeStatistics) -> AffineFit:
    """The semi-orthogonal map nearest to a direction, with least-squares scale and intercept on `fit`."""
    left_FK, _, right_KG = torch.linalg.svd(direction_FG, full_matrices=False)
    rotation_FG = left_FK @ right_KG
    carried = (rotation_FG * (fit.scatter_xx() @ rotation_FG)).sum().clamp(min=torch.finfo(torch.float64).tiny)
    scale = (rotation_FG * fit.scatter_xy()).sum() / carried
    return _with_intercept(scale * rotation_FG, fit, held_out, math.nan)


def _with_intercept(weight_FG: Tensor, fit: RidgeStatistics, held_out: RidgeStatistics, alpha: float) -> AffineFit:
    bias_G = fit.mean_y - fit.mean_x @ weight_FG
    return AffineFit(weight_FG, bias_G, alpha, held_out.explained_variance(weight_FG, bias_G))

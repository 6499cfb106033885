"""Similarity of two models' layers: linear CKA from streamed sums, and the best monotone path through it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from kvcore.types import Tensor

# Below this share of the raw second moments, the centred ones are rounding errors.
NO_VARIATION = 1e-12


class CKAStatistics:
    """Sufficient statistics for linear CKA between every teacher layer and every student layer, in fp64.

    Rows (N) are tokens that both models have read. Memory: about 8 (L_t F + F^2 L_t + G^2 L_s + L_t L_s F G)
    bytes; 1.6 GB for a teacher with 48 layers of 1,024 features and a student with 24 layers of 128.

    Source: Kornblith et al., arXiv 1905.00414.

    Args:
        teacher_layers: L_t.
        student_layers: L_s.
        teacher_features: F.
        student_features: G.
        device: of the sums.
    """

    def __init__(
        self,
        teacher_layers: int,
        student_layers: int,
        teacher_features: int,
        student_features: int,
        device: torch.device | None = None,
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.count = zeros(1)
        self.sum_x_TF = zeros(teacher_layers, teacher_features)
        self.sum_y_SG = zeros(student_layers, student_features)
        self.xx_TFF = zeros(teacher_layers, teacher_features, teacher_features)
        self.yy_SGG = zeros(student_layers, student_features, student_features)
        self.xy_TFSG = zeros(teacher_layers, teacher_features, student_layers, student_features)

    @torch.no_grad()
    def update(self, x_NLF: Tensor, y_NSG: Tensor) -> None:
        """Adds rows: the teacher's [N,L_t,F] and the student's [N,L_s,G], of the same tokens."""
        assert len(x_NLF) == len(y_NSG), "x and y are rows of the same tokens"
        assert x_NLF.shape[1:] == self.sum_x_TF.shape, "x has other layers or features than declared"
        assert y_NSG.shape[1:] == self.sum_y_SG.shape, "y has other layers or features than declared"
        x_NLF, y_NSG = (rows.to(self.count.device, torch.float64) for rows in (x_NLF, y_NSG))
        self.count += len(x_NLF)
        self.sum_x_TF += x_NLF.sum(dim=0)
        self.sum_y_SG += y_NSG.sum(dim=0)
        self.xx_TFF.baddbmm_(x_NLF.permute(1, 2, 0), x_NLF.transpose(0, 1))
        self.yy_SGG.baddbmm_(y_NSG.permute(1, 2, 0), y_NSG.transpose(0, 1))
        # In place, because the sums over all pairs of layers are by far the largest.
        features = self.sum_x_TF.numel(), self.sum_y_SG.numel()
        self.xy_TFSG.view(features).addmm_(x_NLF.flatten(1).T, y_NSG.flatten(1))

    def tensors(self) -> list[Tensor]:
        """The sums; adding another rank's in place (all-reduce) merges both."""
        return [self.count, self.sum_x_TF, self.sum_y_SG, self.xx_TFF, self.yy_SGG, self.xy_TFSG]

    def cka_ST(self) -> Tensor:  # noqa: N802
        """|X'Y|^2 / (|X'X| |Y'Y|) with centred rows and Frobenius norms: fp64 [L_s,L_t], in [0,1].

        1 means that one layer's features are a rotation and a scale of the other's. NaN if a layer never varies, or
        fewer than two rows were added.
        """
        norm_x_T = self._scatter_norms(self.xx_TFF, self.sum_x_TF)
        norm_y_S = self._scatter_norms(self.yy_SGG, self.sum_y_SG)
        columns = [self._cross(layer) / (norm_x_T[layer] * norm_y_S) for layer in range(len(norm_x_T))]
        return torch.stack(columns, dim=1)

    def _cross(self, teacher_layer: int) -> Tensor:
        """Squared norm of the centred cross products of one teacher layer with each student layer: [L_s]."""
        # One teacher layer at a time, because centring all pairs at once would double the memory.
        expected_FSG = torch.einsum("f,sg->fsg", self.sum_x_TF[teacher_layer], self.sum_y_SG / self.count)
        return (self.xy_TFSG[teacher_layer] - expected_FSG).square().sum(dim=(0, 2))

    def _scatter_norms(self, products_LFF: Tensor, sums_LF: Tensor) -> Tensor:
        """Frobenius norm [L] of each layer's centred products; NaN if only rounding errors are left."""
        expected_LFF = torch.einsum("lf,lg->lfg", sums_LF, sums_LF / self.count)
        norms_L = (products_LFF - expected_LFF).flatten(1).norm(dim=1)
        raw_L = products_LFF.flatten(1).norm(dim=1)
        return norms_L.masked_fill(norms_L <= NO_VARIATION * raw_L, math.nan)


def monotone_path(similarity_ST: Sequence[Sequence[float]]) -> list[int]:
    """The teacher layer of each student layer, never decreasing, that maximises the sum of similarities.

    The first student layer takes the first teacher layer, the last takes the last; a student with one layer takes the
    last. Of equally good paths, the one that stays at earlier layers longer. Dynamic programming, O(L_s L_t).
    """
    layers = len(similarity_ST[0])
    if len(similarity_ST) == 1:
        return [layers - 1]
    best_T = [similarity_ST[0][0], *[-math.inf] * (layers - 1)]
    came_from_ST: list[list[int]] = []
    for row_T in similarity_ST[1:]:
        from_T = _running_argmax(best_T)
        best_T = [best_T[before] + here for before, here in zip(from_T, row_T, strict=True)]
        came_from_ST.append(from_T)
    path = [layers - 1]
    for from_T in reversed(came_from_ST):
        path.append(from_T[path[-1]])
    return path[::-1]


def _running_argmax(values: Sequence[float]) -> list[int]:
    """For each index, the first index of the largest value so far."""
    best, at = [], 0
    for index, value in enumerate(values):
        at = index if value > values[at] else at
        best.append(at)
    return best

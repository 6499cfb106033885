"""Each teacher's weight in a sample's target: fixed, by similarity, or by a trained router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from align.head_dim_adapter import KVGeometry
from fuse.fuse_kv import fuse
from fuse.router import Router
from fuse.routing import entropy, temperature, to_weights
from fuse.similarity import teacher_similarity
from kvcore.types import Tensor
from student_trainer.config import FuseConfig


@dataclass(frozen=True, slots=True)
class AlignedTeacher:
    """One teacher's K/V (or a fused target) in the student's space, [B,L,H,M,D], masked by slot.

    The other fields are inputs of routing. `standard_k`, `standard_v`: the K/V standardised with the mean and deviation
    of calibration. `own_k`, `own_v`: the student's K/V at the same tokens of the text, standardised alike.
    `compared_BLHM`: True where the student has such a token.
    """

    k_BLHMD: Tensor
    v_BLHMD: Tensor
    mask_BM: Tensor
    standard_k: Tensor | None = None
    standard_v: Tensor | None = None
    own_k: Tensor | None = None
    own_v: Tensor | None = None
    compared_BLHM: Tensor | None = None


class Fusion(nn.Module):
    """Weighs the teachers of each sample, and fuses them.

    Args:
        settings: kind, metric, router and temperature.
        fixed: the teachers' names and fixed weights, which sum to 1.
        student: its K/V geometry.
        prompt_width: the student's hidden size, which the router reads.
    """

    def __init__(self, settings: FuseConfig, fixed: dict[str, float], student: KVGeometry, prompt_width: int) -> None:
        super().__init__()
        self.settings = settings
        self.names = tuple(fixed)
        self.set_progress(0.0, 0.0)
        self._fixed_N = torch.tensor(list(fixed.values()))
        self.router: Router | None = None
        if settings.kind == "learnable":
            summary = 2 * student.layers * student.features
            self.router = Router(settings.router, len(fixed), prompt_width, settings.router_width, summary)

    @property
    def compares(self) -> bool:
        """Whether weights depend on the student's K/V at the teachers' tokens."""
        return self.settings.kind == "similarity" and not self._warming_up

    @property
    def reads_kv(self) -> bool:
        """Whether weights depend on the teachers' K/V; the other routers see only the prompt."""
        return self.compares or (self.learns and self.settings.router == "attention")

    @property
    def learns(self) -> bool:
        """Whether a router is trained."""
        return self.router is not None

    def set_progress(self, epoch: float, done: float) -> None:
        """Sets the temperature of this epoch, and whether similarity counts. `done`: the fraction of the steps."""
        settings = self.settings
        self._warming_up = settings.kind == "similarity" and done < settings.warmup_ratio
        self.temperature = temperature(
            epoch, settings.temperature, settings.temperature_decay, settings.lowest_temperature
        )

    def weigh(self, teachers: Sequence[AlignedTeacher], prompt_state_BE: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Every sample's weights, [N] (fixed) or [B,N], and the routing metrics (none if fixed).

        The metrics are each teacher's mean weight over the samples that have any K/V, and the entropy of the weights in
        nats, before `choose: top1`. `prompt_state_BE`: the student's state at the end of the prompt, for the router.
        """
        present_BN = torch.stack([teacher.mask_BM.any(dim=1) for teacher in teachers], dim=1)
        if self.settings.kind == "fixed":
            return self._fixed_N.to(present_BN.device), {}
        if self._warming_up:
            fixed_BN = self._fixed_N.to(present_BN.device).log().expand(present_BN.shape)
            soft = weights = to_weights(fixed_BN, present_BN, 1.0)
        else:
            logits = self._logits(teachers, prompt_state_BE)
            soft = to_weights(logits, present_BN, self.temperature, "soft")
            weights = to_weights(logits, present_BN, self.temperature, self.settings.choose)
        means_N = weights.detach().sum(dim=0) / present_BN.any(dim=1).sum().clamp(min=1)
        metrics = {f"routing/weights_mean/{name}": mean for name, mean in zip(self.names, means_N, strict=True)}
        return weights, metrics | {"routing/entropy": entropy(soft, present_BN)}

    def fuse(self, teachers: Sequence[AlignedTeacher], weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted mean k_BLHMD, v_BLHMD and mask_BM. `weights`: from `weigh`; by default the fixed ones."""
        mask_NBM = torch.stack([teacher.mask_BM for teacher in teachers])
        weights = self._fixed_N.to(mask_NBM.device) if weights is None else weights
        k_BLHMD, mask_BM = fuse(torch.stack([teacher.k_BLHMD for teacher in teachers]), mask_NBM, weights)
        v_BLHMD, _ = fuse(torch.stack([teacher.v_BLHMD for teacher in teachers]), mask_NBM, weights)
        return k_BLHMD, v_BLHMD, mask_BM

    def _logits(self, teachers: Sequence[AlignedTeacher], prompt_state_BE: Tensor) -> Tensor:
        if self.router is None:
            return self._similarities(teachers)
        nothing_BNF = prompt_state_BE.new_zeros(len(prompt_state_BE), len(teachers), 0)
        summary_BNF = torch.stack([_summary(one) for one in teachers], dim=1) if self.reads_kv else nothing_BNF
        return self.router(prompt_state_BE.detach(), summary_BNF)

    def _similarities(self, teachers: Sequence[AlignedTeacher]) -> Tensor:
        """[B,N]: the mean over keys and values.

        A teacher that shares no token with the student gets the lowest similarity of the others.
        """
        found: list[Tensor] = []
        compared_BN = torch.stack(
            [teacher.compared_BLHM.flatten(1).any(dim=1) for teacher in teachers if teacher.compared_BLHM is not None],
            1,
        )
        for teacher in teachers:
            assert teacher.compared_BLHM is not None
            sides = ((teacher.own_k, teacher.standard_k), (teacher.own_v, teacher.standard_v))
            similarities = [
                teacher_similarity(own[None], theirs[None], teacher.compared_BLHM[None], self.settings.metric)
                for own, theirs in sides
                if own is not None and theirs is not None
            ]
            found.append(torch.stack(similarities).mean(dim=0))
        sim_BN = torch.cat(found, dim=1)
        least_B1 = sim_BN.masked_fill(~compared_BN, torch.inf).amin(dim=1, keepdim=True)
        return torch.where(compared_BN | least_B1.isinf(), sim_BN, least_B1)


def _summary(teacher: AlignedTeacher) -> Tensor:
    """[B,F]: mean over slots of a teacher's standardised K/V; all layers, heads and dims concatenated."""
    assert teacher.standard_k is not None
    assert teacher.standard_v is not None
    counts_B = teacher.mask_BM.sum(dim=1).clamp(min=1)
    means: list[Tensor] = []
    for x_BLHMD in (teacher.standard_k, teacher.standard_v):
        kept_BLHMD = x_BLHMD.detach().masked_fill(~teacher.mask_BM[:, None, None, :, None], 0.0)
        means.append((kept_BLHMD.sum(dim=3) / counts_B[:, None, None, None]).flatten(1))
    return torch.cat(means, dim=1)

"""Splits reasoning into steps, each of which a block of latents learns to think (LOTUS, arXiv 2606.31779)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

StepKind = Literal["lines", "equations"]
# As GSM8K's calculator annotations, and GSM8K-Aug's steps: <<48/2=24>>.
_EQUATION = re.compile(r"<<([^<>]+)>>")


def steps_of(reasoning: str, kind: StepKind) -> list[str]:
    """The steps of a reasoning: its lines that are not blank, or its equations without their brackets."""
    if kind == "equations":
        return _EQUATION.findall(reasoning)
    return [line.rstrip() for line in reasoning.splitlines() if line.strip()]


@dataclass(frozen=True, slots=True)
class StepBlocks:
    """A student's latents as blocks of equal size, one block per step.

    `kind`: how reasoning is split. `latents`: M. `per_step`: the size of a block, which divides M.
    """

    kind: StepKind
    latents: int
    per_step: int

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return self.latents // self.per_step

    def targets(self, reasoning: str, tokenise: Callable[[str], Sequence[int]]) -> tuple[list[int], list[int]]:
        """What the latents are to predict, token i of step k for latent i of block k, and 1 where there is a token.

        What is beyond the last block, or longer than a block, is left out.
        """
        ids, mask = [0] * self.latents, [0] * self.latents
        for block, step in enumerate(steps_of(reasoning, self.kind)[: self.blocks]):
            for place, token in enumerate(tokenise(step)[: self.per_step], start=block * self.per_step):
                ids[place], mask[place] = token, 1
        return ids, mask

"""Splits reasoning into steps, each of which a block of latents learns to think (LOTUS, arXiv 2606.31779)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

StepKind = Literal["lines", "equations"]
# As GSM8K's calculator annotations, and GSM8K-Aug's steps: <<48/2=24>>.
_EQUATION = re.compile(r"<<([^<>]+)>>")


def steps_of(reasoning: str, kind: StepKind) -> list[str]:
    """The steps of a reasoning: its lines that are not blank, or its equations without their brackets."""
    if kind == "equations":
        return _EQUATION.findall(reasoning)
    return [line.rstrip() for line in reasoning.splitlines() if line.strip()]


def after_steps(reasoning: str, kind: StepKind, count: int) -> str:
    """The reasoning from the start of step `count` + 1 on; nothing if it has no such step."""
    starts = _starts(reasoning, kind)
    return reasoning[starts[count] :] if count < len(starts) else ""


def _starts(reasoning: str, kind: StepKind) -> list[int]:
    """Where each step begins in the reasoning, an equation with its brackets."""
    if kind == "equations":
        return [match.start() for match in _EQUATION.finditer(reasoning)]
    starts, place = list[int](), 0
    for line in reasoning.splitlines(keepends=True):
        if line.strip():
            starts.append(place)
        place += len(line)
    return starts


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

    def first(self, count: int) -> StepBlocks:
        """The first `count` blocks alone."""
        assert 1 <= count <= self.blocks, f"there are {self.blocks} blocks"
        return replace(self, latents=count * self.per_step)

    def targets(self, reasoning: str, tokenise: Callable[[str], Sequence[int]]) -> tuple[list[int], list[int]]:
        """What the latents are to predict, token i of step k for latent i of block k, and 1 where there is a token.

        What is beyond the last block, or longer than a block, is left out.
        """
        ids, mask = [0] * self.latents, [0] * self.latents
        for block, step in enumerate(steps_of(reasoning, self.kind)[: self.blocks]):
            for place, token in enumerate(tokenise(step)[: self.per_step], start=block * self.per_step):
                ids[place], mask[place] = token, 1
        return ids, mask

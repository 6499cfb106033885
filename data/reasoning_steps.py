"""Splits reasoning into steps.

A block of latents learns to think a step (LOTUS, arXiv 2606.31779). CODI (arXiv 2502.21074) and KaVa (arXiv 2510.02312)
leave the last step out, because it usually states the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

StepKind = Literal["lines", "equations"]
# As GSM8K's calculator annotations, and GSM8K-Aug's steps: <<48/2=24>>.
_EQUATION = re.compile(r"<<[^<>]+>>")
_BRACKET = len("<<")
# GSM8K's mark between reasoning and answer, which is no step.
ANSWER_MARK = "####"


def steps_of(reasoning: str, kind: StepKind) -> list[str]:
    """The steps of a reasoning: its lines that are neither blank nor `####`, or its equations without brackets."""
    around = _BRACKET if kind == "equations" else 0
    return [reasoning[start + around : end - around] for start, end in _spans(reasoning, kind)]


def without_last_step(reasoning: str, kind: StepKind) -> str:
    """The reasoning without its last step, and without what separates that from the step before.

    What follows the last step stays, such as the mark `####`. A reasoning of one step stays whole: if it were empty,
    there would be no tokens to select. One without steps stays, too.

    Raises:
        ValueError: there is text around the last equation, so the step is more than the equation.
    """
    spans = _spans(reasoning, kind)
    if len(spans) <= 1:
        return reasoning
    end_before, (start, end) = spans[-2][1], spans[-1]
    between, after = reasoning[end_before:start], reasoning[end:]
    if kind == "equations" and (between + after).replace(ANSWER_MARK, "").strip():
        raise ValueError(f"there is text around its last equation, '{reasoning[start:end]}'")
    return reasoning[:end_before] + after


def _spans(reasoning: str, kind: StepKind) -> list[tuple[int, int]]:
    """Start and end of each step: a line without the spaces at its end, or an equation with its brackets."""
    if kind == "equations":
        return [match.span() for match in _EQUATION.finditer(reasoning)]
    spans: list[tuple[int, int]] = []
    start = 0
    for line in reasoning.splitlines(keepends=True):
        if line.strip() not in ("", ANSWER_MARK):
            spans.append((start, start + len(line.rstrip())))
        start += len(line)
    return spans


def after_steps(reasoning: str, kind: StepKind, count: int) -> str:
    """The reasoning from the start of step `count` + 1 on; nothing if it has no such step."""
    spans = _spans(reasoning, kind)
    return reasoning[spans[count][0] :] if count < len(spans) else ""


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

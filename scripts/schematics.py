"""The pictures that show who does what to whom, and the boxes and arrows that they are made of."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from experiments.charts import LIGHT

_THEME = LIGHT
INK, FAINT, PALE = _THEME.ink, _THEME.faint, "#eef2f6"
BLUE, RED, GREEN, _, _, GREY, *_ = _THEME.series

Point = tuple[float, float]


def draw_direction(figure: Figure) -> None:
    """Which side is mapped, and where the gradient goes."""
    for axes, direction in zip(figure.subplots(1, 2), ("to_student", "to_teacher"), strict=True):
        _canvas(axes, 10, 8)
        axes.set_title(direction, fontweight="bold")
        draw_box(axes, (0.2, 6.2), (4.2, 1.6), "teacher's K/V", BLUE)
        draw_box(axes, (5.6, 6.2), (4.2, 1.6), "student's K/V", GREEN)
        draw_box(axes, (1.2, 0.2), (7.6, 1.4), "KV loss", FAINT)
        to_student = direction == "to_student"
        corner, colour = ((0.2, 3.2), BLUE) if to_student else ((5.6, 3.2), GREEN)
        words = "adapter, frozen" if to_student else "regressor, trains"
        draw_box(axes, corner, (4.2, 1.4), words, colour, filled=False)
        tops: dict[float, tuple[Point, ...]] = {2.3: ((6.2, 1.7),), 7.3: ((6.2, 1.7),)}
        tops[2.3 if to_student else 7.3] = ((6.2, 4.7), (3.2, 1.7))
        for x, steps in tops.items():
            for start, end in steps:
                draw_arrow(axes, (x, start), (x, end))
        for start, end in tops[7.3]:
            draw_arrow(axes, (8.1, end - 0.1), (8.1, start - 0.1), RED)
    figure.supxlabel("red: the gradient of the KV loss", color=RED, fontsize=9)


def draw_router_loss(figure: Figure) -> None:
    """Fused K/V in the reasoning's places, and the way of the gradient back to what made them."""
    axes = figure.subplots()
    _canvas(axes, 20, 9.2)
    columns = ((0.6, 4.3, "prompt", FAINT), (5.2, 5.4, "reasoning", FAINT), (10.9, 3.9, "answer", FAINT))
    draw_box(axes, (0.3, 2.4), (14.8, 2.3), "", GREY, filled=False)
    axes.text(0.7, 4.25, "the student's cache", va="center", color=GREY)
    axes.text(14.7, 4.25, "no gradient to the student", va="center", ha="right", color=GREY)
    for x, width, words, colour in columns:
        fused = words == "reasoning"
        draw_box(axes, (x, 0.3), (width, 1.1), words, colour)
        draw_box(axes, (x, 2.6), (width, 1.1), "fused K/V" if fused else "own K/V", BLUE if fused else FAINT)
        if not fused:
            draw_arrow(axes, (x + width / 2, 1.4), (x + width / 2, 2.5))
    for ends in ([1.65, 2.25], [2.25, 1.65]):
        axes.plot([7.4, 8.4], ends, color=INK)
    draw_box(axes, (15.9, 2.4), (3.8, 2.3), "cross-entropy\nof the answer", FAINT)
    draw_box(axes, (0.6, 7.4), (4.6, 1.5), "teachers' K/V", BLUE)
    draw_box(axes, (6.2, 7.4), (4.6, 1.5), "adapters", RED, filled=False)
    draw_box(axes, (11.8, 7.4), (4.6, 1.5), "router", RED, filled=False)
    draw_box(axes, (6.2, 5.3), (4.6, 1.1), "weights · K/V", FAINT)
    forward = (((15.1, 3.1), (15.8, 3.1)), ((5.3, 8.15), (6.1, 8.15)), ((7.6, 7.4), (7.6, 6.5)),
               ((12.4, 7.4), (10.6, 6.45)), ((7.6, 5.3), (7.6, 3.8)))  # fmt: skip
    for start, end in forward:
        draw_arrow(axes, start, end)
    for start, end in (((9.0, 6.4), (9.0, 7.3)), ((10.9, 6.1), (13.2, 7.3))):
        draw_arrow(axes, start, end, RED)
    draw_arrow(axes, (17.8, 4.8), (10.9, 5.6), RED, bend=0.2)
    axes.text(15.6, 6.2, "gradient", color=RED, ha="center")


def draw_codi(figure: Figure) -> None:
    """Two readings of one student, compared at the token before the answer."""
    axes = figure.subplots()
    _canvas(axes, 14.8, 6.0)
    readings = (
        (4.3, "after written reasoning, taken as a constant", "reasoning", BLUE),
        (0.5, "after latents", "latents", GREEN),
    )
    for y, words, name, colour in readings:
        axes.text(0.2, y + 1.35, words, va="center", color=GREY)
        draw_box(axes, (0.2, y), (4.0, 1.0), "prompt", FAINT)
        draw_box(axes, (4.4, y), (6.6, 1.0), name, colour)
        draw_box(axes, (11.2, y), (3.4, 1.0), "answer", FAINT)
        # The last place before the answer.
        draw_box(axes, (10.4, y), (0.6, 1.0), "", RED)
    axes.annotate("", (10.7, 1.55), (10.7, 4.25), arrowprops={"arrowstyle": "<|-|>", "color": RED})
    axes.text(10.2, 2.9, "hidden states of every layer:\nsmooth L1 over their deviation", color=RED, va="center",
              ha="right")  # fmt: skip


def draw_box(axes: Axes, corner: Point, size: Point, words: str, colour: str, *, filled: bool = True) -> None:
    """A rounded box with words in its middle."""
    style: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=0.12", "linewidth": 1.2}
    face = colour if filled else "white"
    axes.add_patch(FancyBboxPatch(corner, *size, facecolor=face, edgecolor=colour, zorder=2, **style))
    ink = "w" if filled and colour != FAINT else INK
    x, y = corner[0] + size[0] / 2, corner[1] + size[1] / 2
    axes.text(x, y, words, ha="center", va="center", zorder=3, color=ink)


def draw_arrow(axes: Axes, start: Point, end: Point, colour: str = INK, *, bend: float = 0.0) -> None:
    """An arrow from one place to another."""
    style: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 11, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
    connection = f"arc3,rad={bend}"
    axes.add_patch(FancyArrowPatch(start, end, color=colour, connectionstyle=connection, zorder=4, **style))


def seeded(seed: int) -> torch.Generator:
    """Random numbers that are the same every time."""
    return torch.Generator().manual_seed(seed)


def _canvas(axes: Axes, width: float, height: float) -> None:
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
